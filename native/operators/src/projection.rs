//! `Projection`: y [..., N] = x [..., K] Wᵀ + bias [N].

use std::ffi::CStr;

use phimoe_kernels::{Kernels, Layout, Matrix, Output, Row};

use crate::ensure;
use crate::ort::{Context, Info, Operator, Port, Result};
use crate::schedule::{cut, quantize, share};

const X: usize = 0;
const WEIGHT: usize = 1;
const BIAS: usize = 2;

pub struct Projection {
    kernels: &'static Kernels,
    layout: Layout,
}

impl Operator for Projection {
    const NAME: &'static CStr = c"Projection";
    const INPUTS: &'static [Port] = &[Port::new::<f32>("x"), Port::new::<u8>("weight"), Port::optional::<f32>("bias")];
    const OUTPUTS: &'static [Port] = &[Port::new::<f32>("y")];

    fn new(info: &Info) -> Result<Self> {
        let [inputs, outputs] = [info.size(c"in_features")?, info.size(c"out_features")?];
        let layout = Layout::new(info.bits(c"bits")?, inputs, outputs, info.size(c"superblock_size")?)?;
        let made = Self { kernels: Kernels::detect()?, layout };
        if let Some(shape) = info.constant_shape::<u8>(&Self::INPUTS[WEIGHT], WEIGHT)? {
            made.check_weight(&shape)?;
        }
        if let Some(shape) = info.constant_shape::<f32>(&Self::INPUTS[BIAS], BIAS)? {
            made.check_bias(&shape)?;
        }
        Ok(made)
    }

    fn run(&self, context: &Context) -> Result<()> {
        let x = context.input::<f32>(X)?;
        let weight = context.input::<u8>(WEIGHT)?;
        let bias = context.optional_input::<f32>(BIAS)?;
        self.check_weight(&weight.shape)?;
        if let Some(bias) = &bias {
            self.check_bias(&bias.shape)?;
        }
        let [inputs, outputs] = [self.layout.in_features(), self.layout.out_features()];
        let Some((&width, outer)) = x.shape.split_last() else {
            ensure!(false, "x is [], expected [..., {inputs}]");
            return Ok(());
        };
        ensure!(width == inputs, "x is {:?}, expected [..., {inputs}]", x.shape);
        let y = context.output::<f32>(0, &[outer, &[outputs]].concat())?;

        let matrix = Matrix::new(self.layout, weight.data)?;
        let bias = bias.map(|bias| bias.data);
        let quantized = quantize(context, self.kernels, x.data, inputs, self.layout.superblock_size(), |_| Ok(()))?;
        let rows: Vec<Row> = quantized.iter().flat_map(|(rows, ())| rows.iter()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let y = Output::new(y, rows.len(), outputs, outputs)?;
        let tasks = cut(self.layout.strips(), self.layout.strip_bytes());
        share(
            context,
            tasks.len(),
            || (),
            |(), task| {
                let strips = tasks[task].clone();
                let columns = strips.start * 16..(strips.end * 16).min(outputs);
                // SAFETY: a task has its columns alone.
                let mut part = unsafe { y.part(0..rows.len(), columns) };
                Ok(self.kernels.multiply(&matrix, strips, &rows, bias, &mut part)?)
            },
        )
    }
}

impl Projection {
    fn check_weight(&self, shape: &[usize]) -> Result<()> {
        let expected = [self.layout.strips(), self.layout.strip_bytes()];
        ensure!(shape == expected, "weight is {shape:?}, expected {expected:?}");
        Ok(())
    }

    fn check_bias(&self, shape: &[usize]) -> Result<()> {
        ensure!(shape == [self.layout.out_features()], "bias is {shape:?}, expected [{}]", self.layout.out_features());
        Ok(())
    }
}
