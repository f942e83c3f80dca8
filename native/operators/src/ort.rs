//! ONNX Runtime's C interface as safe Rust: an operator sees attributes, tensors, errors and `Context::parallel`.
//!
//! No panic crosses into C: what the callbacks run is caught, and becomes an ONNX Runtime exception with its text.

use std::any::Any;
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};

use ort_sys::{
    ONNXTensorElementDataType as ElementType, OrtApi, OrtCustomOp, OrtCustomOpInputOutputCharacteristic as Presence,
    OrtErrorCode, OrtKernelContext, OrtKernelInfo, OrtMemType, OrtStatusPtr, OrtValue,
};

/// The largest number of inputs, outputs or experts.
const LARGEST_SIZE: usize = 1 << 30;

/// What was found and what was expected; `Operator` and node are put before it.
#[derive(Debug)]
pub struct Error(pub String);

pub type Result<T> = std::result::Result<T, Error>;

impl From<phimoe_kernels::Error> for Error {
    fn from(error: phimoe_kernels::Error) -> Self {
        Self(error.to_string())
    }
}

/// Returns an error with the text unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::ort::Error(format!($($text)+)));
        }
    };
}

/// An input or output as an operator declares it.
pub struct Port {
    pub name: &'static str,
    pub element: ElementType,
    pub optional: bool,
}

impl Port {
    pub const fn new<T: Element>(name: &'static str) -> Self {
        Self { name, element: T::TYPE, optional: false }
    }

    pub const fn optional<T: Element>(name: &'static str) -> Self {
        Self { name, element: T::TYPE, optional: true }
    }
}

/// # Safety
/// Every value of the type's size in bytes is a value of the type, and `TYPE` is ONNX Runtime's name of it.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    const TYPE: ElementType;
}

// SAFETY: plain numbers, each under its own name.
unsafe impl Element for f32 {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
// SAFETY: as above; a `Half` is its sixteen bits.
unsafe impl Element for phimoe_kernels::Half {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}
// SAFETY: as above.
unsafe impl Element for i8 {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
}
// SAFETY: as above.
unsafe impl Element for u8 {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}
// SAFETY: as above.
unsafe impl Element for i32 {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}
// SAFETY: as above.
unsafe impl Element for i64 {
    const TYPE: ElementType = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

/// An operator: made once for a node, run from any number of threads at once.
pub trait Operator: Sized + Send + Sync + 'static {
    const NAME: &'static CStr;
    const INPUTS: &'static [Port];
    const OUTPUTS: &'static [Port];

    fn new(info: &Info) -> Result<Self>;
    fn run(&self, context: &Context) -> Result<()>;
}

#[derive(Clone, Copy)]
struct Api(&'static OrtApi);

impl Api {
    fn check(self, status: OrtStatusPtr) -> Result<()> {
        if status.0.is_null() {
            return Ok(());
        }
        // SAFETY: a status that is not null is an error with a text, ours to release.
        unsafe {
            let text = CStr::from_ptr((self.0.GetErrorMessage)(status.0)).to_string_lossy().into_owned();
            (self.0.ReleaseStatus)(status.0);
            Err(Error(text))
        }
    }

    fn status(self, result: Result<()>) -> OrtStatusPtr {
        match result {
            Ok(()) => OrtStatusPtr::default(),
            Err(error) => {
                let text = CString::new(error.0.replace('\0', " ")).unwrap_or_default();
                // SAFETY: the text ends with a zero, and ONNX Runtime copies it.
                unsafe { (self.0.CreateStatus)(OrtErrorCode::ORT_INVALID_ARGUMENT, text.as_ptr()) }
            }
        }
    }

    /// A tensor's shape and address.
    ///
    /// # Safety
    /// `value` is a value that ONNX Runtime gave out and holds as long as 'a.
    unsafe fn place<'a, T: Element>(self, value: *const OrtValue, name: &str) -> Result<Place<'a, T>> {
        let mut information = null_mut();
        let mut element = ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let mut dimensions = Vec::new();
        let mut address = null_mut();
        // SAFETY: all that is given lives on this stack; the description of the shape is released here.
        unsafe {
            self.check((self.0.GetTensorTypeAndShape)(value, &mut information))?;
            let found = (|| {
                let mut rank = 0;
                self.check((self.0.GetTensorElementType)(information, &mut element))?;
                self.check((self.0.GetDimensionsCount)(information, &mut rank))?;
                dimensions.resize(rank, 0i64);
                self.check((self.0.GetDimensions)(information, dimensions.as_mut_ptr(), rank))
            })();
            (self.0.ReleaseTensorTypeAndShapeInfo)(information);
            found?;
            self.check((self.0.GetTensorMutableData)(value.cast_mut(), &mut address))?;
        }
        ensure!(element == T::TYPE, "{name} holds {element:?}, expected {:?}", T::TYPE);
        let shape: Vec<usize> = dimensions.iter().map(|&dimension| usize::try_from(dimension).unwrap_or(0)).collect();
        let length = shape.iter().product();
        let mut address = address.cast::<T>();
        if length == 0 {
            address = std::ptr::NonNull::dangling().as_ptr(); // ONNX Runtime's may be null
        }
        ensure!(address.is_aligned(), "{name} lies at {address:p}, expected a multiple of {}", align_of::<T>());
        Ok(Place { shape, address, length, lifetime: PhantomData })
    }
}

/// Where a tensor lies, for an operator whose inputs and outputs may share memory.
pub struct Place<'a, T> {
    pub shape: Vec<usize>,
    address: *mut T,
    length: usize,
    lifetime: PhantomData<&'a T>,
}

// SAFETY: an address; whoever makes a slice of it answers for it.
unsafe impl<T: Element> Sync for Place<'_, T> {}

impl<'a, T: Element> Place<'a, T> {
    /// Memory whose parts several threads write.
    pub fn over(memory: &'a mut [T]) -> Self {
        let (address, length) = (memory.as_mut_ptr(), memory.len());
        Self { shape: vec![length], address, length, lifetime: PhantomData }
    }

    /// Whether both are the same memory; an error if they share a part of it.
    pub fn is(&self, other: &Self) -> Result<bool> {
        let (first, second) = (self.address as usize, other.address as usize);
        let apart = first + self.length * size_of::<T>() <= second || second + other.length * size_of::<T>() <= first;
        let same = first == second && self.shape == other.shape;
        ensure!(
            same || apart || self.length == 0 || other.length == 0,
            "an input {:?} and an output {:?} overlap in memory, expected one buffer of one shape, or two",
            self.shape,
            other.shape
        );
        Ok(same)
    }

    /// # Safety
    /// Nobody writes the range as long as the slice lives.
    pub unsafe fn part(&self, range: Range<usize>) -> &'a [T] {
        // SAFETY: inside the tensor, and not written, says the caller.
        unsafe { std::slice::from_raw_parts(self.at(&range), range.len()) }
    }

    /// # Safety
    /// Nobody else reads or writes the range as long as the slice lives, and an input is not written at all.
    #[allow(clippy::mut_from_ref)] // that is what it is for
    pub unsafe fn part_mut(&self, range: Range<usize>) -> &'a mut [T] {
        // SAFETY: inside the tensor, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(&range), range.len()) }
    }

    fn at(&self, range: &Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} of {} elements", self.length);
        // SAFETY: inside the tensor.
        unsafe { self.address.add(range.start) }
    }
}

/// A tensor that nobody writes to.
pub struct Tensor<'a, T> {
    pub shape: Vec<usize>,
    pub data: &'a [T],
}

/// What is known of a node when a session is made.
pub struct Info {
    api: Api,
    raw: *const OrtKernelInfo,
}

impl Info {
    /// An integer attribute of at least 1.
    pub fn size(&self, name: &CStr) -> Result<usize> {
        let value = self.integer(name).ok_or_else(|| missing(name))?;
        match usize::try_from(value) {
            Ok(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(size),
            _ => Err(Error(format!("{} is {value}, expected 1 to {LARGEST_SIZE}", name.to_string_lossy()))),
        }
    }

    /// The bits of a code, which `Layout::new` checks further.
    pub fn bits(&self, name: &CStr) -> Result<u32> {
        Ok(u32::try_from(self.size(name)?).unwrap_or(u32::MAX))
    }

    pub fn integer(&self, name: &CStr) -> Option<i64> {
        let mut value = 0;
        // SAFETY: the name ends with a zero, the value is on this stack.
        let status = unsafe { (self.api.0.KernelInfoGetAttribute_int64)(self.raw, name.as_ptr(), &mut value) };
        self.api.check(status).ok().map(|()| value)
    }

    pub fn float(&self, name: &CStr) -> Result<f32> {
        let mut value = 0.0;
        // SAFETY: as in `integer`.
        let status = unsafe { (self.api.0.KernelInfoGetAttribute_float)(self.raw, name.as_ptr(), &mut value) };
        self.api.check(status).map(|()| value).map_err(|_| missing(name))
    }

    /// The shape of an input whose numbers are in the model; None if they are computed or there is no such input.
    pub fn constant_shape<T: Element>(&self, port: &Port, index: usize) -> Result<Option<Vec<usize>>> {
        let (mut inputs, mut is_constant, mut value) = (0, 0, null());
        // SAFETY: all results are on this stack.
        unsafe {
            self.api.check((self.api.0.KernelInfo_GetInputCount)(self.raw, &mut inputs))?;
            if index >= inputs {
                return Ok(None);
            }
            let status = (self.api.0.KernelInfoGetConstantInput_tensor)(self.raw, index, &mut is_constant, &mut value);
            if self.api.check(status).is_err() || is_constant == 0 || value.is_null() {
                return Ok(None);
            }
            Ok(Some(self.api.place::<T>(value, port.name)?.shape))
        }
    }

    fn node(&self) -> String {
        let mut size = 0;
        let mut name: Vec<u8> = Vec::new();
        // SAFETY: the first call asks for the size with its zero, the second fills as much.
        unsafe {
            let _ = self.api.check((self.api.0.KernelInfo_GetNodeName)(self.raw, null_mut(), &mut size));
            name.resize(size, 0);
            let status = (self.api.0.KernelInfo_GetNodeName)(self.raw, name.as_mut_ptr().cast(), &mut size);
            let _ = self.api.check(status);
        }
        name.retain(|&byte| byte != 0);
        String::from_utf8_lossy(&name).into_owned()
    }
}

fn missing(name: &CStr) -> Error {
    Error(format!("the attribute {} is missing, or of another type", name.to_string_lossy()))
}

/// One run of a node.
pub struct Context {
    api: Api,
    raw: *mut OrtKernelContext,
    inputs: &'static [Port],
    outputs: &'static [Port],
    /// The outputs that were given out, as bits: each once, as they are borrowed for writing.
    taken: Cell<u64>,
}

impl Context {
    pub fn input<T: Element>(&self, index: usize) -> Result<Tensor<'_, T>> {
        let name = self.inputs[index].name;
        self.optional_input(index)?.ok_or_else(|| Error(format!("{name} is missing")))
    }

    pub fn optional_input<T: Element>(&self, index: usize) -> Result<Option<Tensor<'_, T>>> {
        Ok(self.place(index)?.map(|place: Place<'_, T>| Tensor {
            // SAFETY: ONNX Runtime keeps an input during the run, and nothing writes to it: an operator whose output
            // may share its memory asks for its `place` instead.
            data: unsafe { std::slice::from_raw_parts(place.address, place.length) },
            shape: place.shape,
        }))
    }

    /// An input that may share its memory with an output.
    pub fn place<T: Element>(&self, index: usize) -> Result<Option<Place<'_, T>>> {
        let (mut count, mut value) = (0, null());
        // SAFETY: the context is that of this run, all results are on this stack.
        unsafe {
            self.api.check((self.api.0.KernelContext_GetInputCount)(self.raw, &mut count))?;
            if index >= count {
                return Ok(None);
            }
            self.api.check((self.api.0.KernelContext_GetInput)(self.raw, index, &mut value))?;
            if value.is_null() {
                return Ok(None);
            }
            self.api.place(value, self.inputs[index].name).map(Some)
        }
    }

    /// An output of that shape, to be written.
    #[allow(clippy::mut_from_ref)] // each is given out once
    pub fn output<T: Element>(&self, index: usize, shape: &[usize]) -> Result<&mut [T]> {
        let place = self.output_place(index, shape)?;
        // SAFETY: ONNX Runtime's memory for this output, valid during the run, and nobody else has it.
        Ok(unsafe { std::slice::from_raw_parts_mut(place.address, place.length) })
    }

    /// As `output`, where it may share its memory with an input.
    pub fn output_place<T: Element>(&self, index: usize, shape: &[usize]) -> Result<Place<'_, T>> {
        let name = self.outputs[index].name;
        ensure!(self.taken.get() >> index & 1 == 0, "the output {name} is asked for twice");
        self.taken.set(self.taken.get() | 1 << index);
        let dimensions: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        let mut value = null_mut();
        // SAFETY: the context is that of this run; the value lives as long as it does.
        let place = unsafe {
            let (dimensions, rank) = (dimensions.as_ptr(), dimensions.len());
            self.api.check((self.api.0.KernelContext_GetOutput)(self.raw, index, dimensions, rank, &mut value))?;
            ensure!(!value.is_null(), "the output {name} has no name, expected one");
            self.api.place::<T>(value, name)?
        };
        ensure!(place.shape == shape, "{name} is {:?}, expected {shape:?}", place.shape);
        Ok(place)
    }

    /// Runs `work(0)` to `work(workers - 1)` on ONNX Runtime's threads for this session, this one among them, and
    /// returns when all are done. They may run one after the other.
    pub fn parallel(&self, workers: usize, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
        if workers <= 1 {
            return (0..workers).try_for_each(work);
        }
        let region = Region { work, error: Mutex::new(None) };
        // SAFETY: the call returns when every worker has, so the region outlives them.
        let status = unsafe {
            let data = (&raw const region).cast_mut().cast::<c_void>();
            (self.api.0.KernelContext_ParallelFor)(self.raw, run_worker, workers, 0, data)
        };
        self.api.check(status)?;
        region.error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

struct Region<'a> {
    work: &'a (dyn Fn(usize) -> Result<()> + Sync),
    /// The first.
    error: Mutex<Option<Error>>,
}

unsafe extern "C" fn run_worker(data: *mut c_void, worker: usize) {
    // SAFETY: `Context::parallel` gave this address, and waits.
    let region = unsafe { &*data.cast::<Region<'_>>() };
    if let Err(error) = caught(|| (region.work)(worker)) {
        region.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    format!("{text}; this is a bug of phimoe-onnx, please report it")
}

fn caught<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(Error(panic_text(&*panic))))
}

struct Kernel<O> {
    api: Api,
    node: String,
    operator: O,
}

fn named<O: Operator>(node: &str, error: Error) -> Error {
    Error(format!("phimoe.native.{} {node}: {}", O::NAME.to_string_lossy(), error.0))
}

unsafe extern "system" fn create<O: Operator>(
    _: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: ONNX Runtime's table of functions lives as long as the process.
    let api = Api(unsafe { &*api });
    let info = Info { api, raw: info };
    let made = caught(|| {
        let node = info.node();
        let operator = O::new(&info).map_err(|error| named::<O>(&node, error))?;
        Ok(Box::into_raw(Box::new(Kernel { api, node, operator })))
    });
    api.status(made.map(|made| {
        // SAFETY: where ONNX Runtime wants the kernel; `destroy` takes it back.
        unsafe { *kernel = made.cast() };
    }))
}

unsafe extern "system" fn compute<O: Operator>(kernel: *mut c_void, context: *mut OrtKernelContext) -> OrtStatusPtr {
    // SAFETY: made by `create`; runs share it.
    let kernel = unsafe { &*kernel.cast::<Kernel<O>>() };
    let context =
        Context { api: kernel.api, raw: context, inputs: O::INPUTS, outputs: O::OUTPUTS, taken: Cell::new(0) };
    let result = caught(|| kernel.operator.run(&context));
    kernel.api.status(result.map_err(|error| named::<O>(&kernel.node, error)))
}

unsafe extern "system" fn destroy<O: Operator>(kernel: *mut c_void) {
    // SAFETY: made by `create`, and nothing runs it any more.
    let kernel = unsafe { Box::from_raw(kernel.cast::<Kernel<O>>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(kernel)));
}

unsafe extern "system" fn name<O: Operator>(_: *const OrtCustomOp) -> *const c_char {
    O::NAME.as_ptr()
}

unsafe extern "system" fn provider(_: *const OrtCustomOp) -> *const c_char {
    null() // the CPU
}

unsafe extern "system" fn input_type<O: Operator>(_: *const OrtCustomOp, index: usize) -> ElementType {
    O::INPUTS.get(index).map_or(ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, |port| port.element)
}

unsafe extern "system" fn output_type<O: Operator>(_: *const OrtCustomOp, index: usize) -> ElementType {
    O::OUTPUTS.get(index).map_or(ElementType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, |port| port.element)
}

unsafe extern "system" fn input_count<O: Operator>(_: *const OrtCustomOp) -> usize {
    O::INPUTS.len()
}

unsafe extern "system" fn output_count<O: Operator>(_: *const OrtCustomOp) -> usize {
    O::OUTPUTS.len()
}

fn presence(port: Option<&Port>) -> Presence {
    match port {
        Some(Port { optional: true, .. }) => Presence::INPUT_OUTPUT_OPTIONAL,
        _ => Presence::INPUT_OUTPUT_REQUIRED,
    }
}

unsafe extern "system" fn input_presence<O: Operator>(_: *const OrtCustomOp, index: usize) -> Presence {
    presence(O::INPUTS.get(index))
}

unsafe extern "system" fn output_presence<O: Operator>(_: *const OrtCustomOp, index: usize) -> Presence {
    presence(O::OUTPUTS.get(index))
}

unsafe extern "system" fn memory(_: *const OrtCustomOp, _: usize) -> OrtMemType {
    OrtMemType::OrtMemTypeDefault
}

unsafe extern "system" fn one(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn last_version(_: *const OrtCustomOp) -> c_int {
    c_int::MAX
}

/// The callbacks by which ONNX Runtime knows the operator.
pub const fn custom_op<O: Operator>() -> OrtCustomOp {
    OrtCustomOp {
        version: ort_sys::ORT_API_VERSION,
        CreateKernel: None,
        GetName: Some(name::<O>),
        GetExecutionProviderType: Some(provider),
        GetInputType: Some(input_type::<O>),
        GetInputTypeCount: Some(input_count::<O>),
        GetOutputType: Some(output_type::<O>),
        GetOutputTypeCount: Some(output_count::<O>),
        KernelCompute: None,
        KernelDestroy: Some(destroy::<O>),
        GetInputCharacteristic: Some(input_presence::<O>),
        GetOutputCharacteristic: Some(output_presence::<O>),
        GetInputMemoryType: Some(memory),
        GetVariadicInputMinArity: Some(one),
        GetVariadicInputHomogeneity: Some(one),
        GetVariadicOutputMinArity: Some(one),
        GetVariadicOutputHomogeneity: Some(one),
        CreateKernelV2: Some(create::<O>),
        KernelComputeV2: Some(compute::<O>),
        InferOutputShapeFn: None,
        GetStartVersion: Some(one),
        GetEndVersion: Some(last_version),
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Mutex, Region, caught, run_worker};

    #[test]
    fn a_panic_becomes_an_error_with_its_text() {
        let error = caught::<()>(|| panic!("{} is odd", 3)).unwrap_err();
        assert!(error.0.starts_with("3 is odd; this is a bug of phimoe-onnx"), "{error:?}");
    }

    #[test]
    fn the_first_error_of_a_workers_region_is_kept() {
        let work = |worker: usize| match worker {
            0 => Ok(()),
            1 => panic!("worker 1"),
            _ => Err(Error(format!("worker {worker}"))),
        };
        let region = Region { work: &work, error: Mutex::new(None) };
        for worker in 0..3 {
            // SAFETY: the region is on this stack, and this thread alone has it.
            unsafe { run_worker((&raw const region).cast_mut().cast(), worker) };
        }
        let error = region.error.into_inner().unwrap().unwrap();
        assert!(error.0.starts_with("worker 1;"), "{error:?}");
    }
}
