//! `SparseMixerMoE`: the router, and the gate, up and down projections of the two experts that it chooses for a token.

use std::cmp::Reverse;
use std::ffi::CStr;

use phimoe_kernels::{Expert, Kernels, Layout, Matrix, Output, Row, STRIP, sparse_mixer};

use crate::ahead;
use crate::ensure;
use crate::ort::{Context, Error, Info, Operator, Port, Result};
use crate::schedule::{cut, quantize, share};

const X: usize = 0;
const ROUTER: usize = 1;
const EXPERTS: usize = 2;

pub struct SparseMixerMoe {
    kernels: &'static Kernels,
    /// Of gate, and of up as well.
    gate: Layout,
    down: Layout,
    experts: usize,
    expert_bytes: usize,
    jitter: f32,
}

/// What one expert has to do: the rows `first` to `first + tokens.len()` of all choices, sorted by expert.
struct Bucket<'a> {
    expert: Expert<'a>,
    /// The bytes of the expert's gate and up, and of its down.
    gate_up: &'a [u8],
    down: &'a [u8],
    first: usize,
    tokens: Vec<usize>,
}

impl Operator for SparseMixerMoe {
    const NAME: &'static CStr = c"SparseMixerMoE";
    const INPUTS: &'static [Port] = &[Port::new::<f32>("x"), Port::new::<f32>("router"), Port::new::<u8>("experts")];
    const OUTPUTS: &'static [Port] = &[Port::new::<f32>("y")];

    fn new(info: &Info) -> Result<Self> {
        let [hidden, intermediate] = [info.size(c"hidden_size")?, info.size(c"intermediate_size")?];
        let gate =
            Layout::new(info.bits(c"gate_up_bits")?, hidden, intermediate, info.size(c"gate_up_superblock_size")?)
                .map_err(|error| Error(format!("gate_up: {error}")))?;
        let down = Layout::new(info.bits(c"down_bits")?, intermediate, hidden, info.size(c"down_superblock_size")?)
            .map_err(|error| Error(format!("down: {error}")))?;
        let (experts, jitter) = (info.size(c"num_experts")?, info.float(c"router_jitter_noise")?);
        ensure!(experts >= 2, "num_experts is {experts}, expected 2 or more");
        ensure!(jitter.is_finite() && jitter >= 0.0, "router_jitter_noise is {jitter}, expected 0 or more");
        let expert_bytes = Expert::bytes(gate, down)?;
        let made = Self { kernels: Kernels::detect()?, gate, down, experts, expert_bytes, jitter };
        if let Some(shape) = info.constant_shape::<f32>(&Self::INPUTS[ROUTER], ROUTER)? {
            made.check_router(&shape)?;
        }
        if let Some(shape) = info.constant_shape::<u8>(&Self::INPUTS[EXPERTS], EXPERTS)? {
            made.check_experts(&shape)?;
        }
        Ok(made)
    }

    fn run(&self, context: &Context) -> Result<()> {
        let x = context.input::<f32>(X)?;
        let router = context.input::<f32>(ROUTER)?;
        let experts = context.input::<u8>(EXPERTS)?;
        self.check_router(&router.shape)?;
        self.check_experts(&experts.shape)?;
        let hidden = self.gate.in_features();
        ensure!(x.shape.last() == Some(&hidden), "x is {:?}, expected [..., {hidden}]", x.shape);
        let y = context.output::<f32>(0, &x.shape)?;
        if x.data.is_empty() {
            return Ok(());
        }

        let routed = quantize(context, self.kernels, x.data, hidden, self.gate.superblock_size(), |x| {
            self.route(x, router.data)
        })?;
        let rows: Vec<Row> = routed.iter().flat_map(|(rows, _)| rows.iter()).collect();
        let routes: Vec<[(usize, f32); 2]> = routed.iter().flat_map(|(_, routes)| routes).copied().collect();
        let (buckets, places) = self.buckets(&routes, experts.data)?;
        let (gate_up, down): (Vec<&[u8]>, Vec<&[u8]>) = buckets.iter().map(|b| (b.gate_up, b.down)).unzip();
        let asked = ahead::ask(&gate_up, &down);
        let activated = self.gate_up(context, &buckets, &rows)?;
        let (kernels, size) = (self.kernels, self.down.superblock_size());
        let activated = quantize(context, kernels, &activated, self.gate.out_features(), size, |_| Ok(()))?;
        let activated: Vec<Row> = activated.iter().flat_map(|(rows, ())| rows.iter()).collect();
        self.down(context, &buckets, &activated, &routes, &places, y)?;
        if 2 * buckets.len() > self.experts {
            ahead::let_go(&asked);
        }
        Ok(())
    }
}

impl SparseMixerMoe {
    fn check_router(&self, shape: &[usize]) -> Result<()> {
        let expected = [self.experts, self.gate.in_features()];
        ensure!(shape == expected, "router is {shape:?}, expected {expected:?}");
        Ok(())
    }

    fn check_experts(&self, shape: &[usize]) -> Result<()> {
        let expected = [self.experts, self.expert_bytes];
        ensure!(shape == expected, "experts is {shape:?}, expected {expected:?}");
        Ok(())
    }

    /// The experts of some tokens x [R, H], with their weights.
    fn route(&self, x: &[f32], router: &[f32]) -> Result<Vec<[(usize, f32); 2]>> {
        let mut scores = vec![0.0; self.experts];
        x.chunks_exact(self.gate.in_features())
            .map(|x| {
                self.kernels.router_scores(x, router, &mut scores)?;
                Ok(sparse_mixer(&scores, self.jitter))
            })
            .collect()
    }

    /// The experts that have tokens, those with the most first, and of each token the places of its two choices.
    fn buckets<'a>(
        &self,
        routes: &[[(usize, f32); 2]],
        experts: &'a [u8],
    ) -> Result<(Vec<Bucket<'a>>, Vec<[usize; 2]>)> {
        let mut choices = vec![Vec::new(); self.experts];
        for (token, route) in routes.iter().enumerate() {
            for (slot, (expert, _)) in route.iter().enumerate() {
                choices[*expert].push((token, slot));
            }
        }
        let mut order: Vec<usize> = (0..self.experts).filter(|index| !choices[*index].is_empty()).collect();
        order.sort_by_key(|index| Reverse(choices[*index].len()));
        let mut places = vec![[0; 2]; routes.len()];
        let mut first = 0;
        let mut buckets = Vec::new();
        for index in order {
            let bytes = &experts[index * self.expert_bytes..][..self.expert_bytes];
            for (place, (token, slot)) in (first..).zip(&choices[index]) {
                places[*token][*slot] = place;
            }
            let tokens: Vec<usize> = choices[index].iter().map(|(token, _)| *token).collect();
            let (gate_up, down) = bytes.split_at(bytes.len() - self.down.bytes());
            let expert = Expert::new(self.gate, self.down, bytes)?;
            buckets.push(Bucket { expert, gate_up, down, first, tokens });
            first += choices[index].len();
        }
        Ok((buckets, places))
    }

    /// silu(gate) * up [choices, I].
    fn gate_up(&self, context: &Context, buckets: &[Bucket], rows: &[Row]) -> Result<Vec<f32>> {
        let (intermediate, strips) = (self.gate.out_features(), self.gate.strips());
        let chosen: Vec<Vec<Row>> =
            buckets.iter().map(|bucket| bucket.tokens.iter().map(|token| rows[*token]).collect()).collect();
        let choices = 2 * rows.len();
        let mut activated = vec![0.0; choices * intermediate];
        let output = Output::new(&mut activated, choices, intermediate, intermediate)?;
        let pieces = cut(strips, 2 * self.gate.strip_bytes());
        share(
            context,
            buckets.len() * pieces.len(),
            || (),
            |(), task| {
                let (bucket, strips) = (task / pieces.len(), pieces[task % pieces.len()].clone());
                let (Bucket { expert, first, tokens, .. }, rows) = (&buckets[bucket], &chosen[bucket]);
                let columns = strips.start * STRIP..(strips.end * STRIP).min(intermediate);
                // SAFETY: a task has these columns of an expert's rows alone.
                let mut part = unsafe { output.part(*first..first + tokens.len(), columns) };
                Ok(self.kernels.gate_up(expert, strips, rows, &mut part)?)
            },
        )?;
        Ok(activated)
    }

    /// y [R, H], the weighted sum of both experts' outputs. A task computes some columns of all of them.
    fn down(
        &self,
        context: &Context,
        buckets: &[Bucket],
        rows: &[Row],
        routes: &[[(usize, f32); 2]],
        places: &[[usize; 2]],
        y: &mut [f32],
    ) -> Result<()> {
        let hidden = self.down.out_features();
        let y = Output::new(y, routes.len(), hidden, hidden)?;
        let strip_bytes = self.down.strip_bytes();
        let pieces = cut(self.down.strips(), buckets.len() * strip_bytes);
        share(context, pieces.len(), Vec::new, |products: &mut Vec<f32>, task| {
            let strips = pieces[task].clone();
            let columns = strips.start * STRIP..(strips.end * STRIP).min(hidden);
            let width = columns.len();
            let layout = Layout::new(self.down.bits(), self.down.in_features(), width, self.down.superblock_size())?;
            products.resize(rows.len() * width, 0.0);
            for Bucket { down, first, tokens, .. } in buckets {
                let matrix = Matrix::new(layout, &down[strips.start * strip_bytes..strips.end * strip_bytes])?;
                let own = &mut products[first * width..][..tokens.len() * width];
                let mut own = Output::new(own, tokens.len(), width, width)?;
                let rows = &rows[*first..first + tokens.len()];
                self.kernels.multiply(&matrix, 0..strips.len(), rows, None, &mut own.whole())?;
            }
            // SAFETY: a task has its columns alone.
            let mut part = unsafe { y.part(0..routes.len(), columns.clone()) };
            for (token, ([(_, p1), (_, p2)], [first, second])) in routes.iter().zip(places).enumerate() {
                let [first, second] = [first, second].map(|place| &products[place * width..][..width]);
                let y = part.row(token, columns.clone());
                self.kernels.weighted_sum(first, *p1, second, *p2, y)?;
            }
            Ok(())
        })
    }
}
