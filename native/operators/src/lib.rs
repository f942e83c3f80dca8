//! The operators of the domain `phimoe.native`, for ONNX Runtime's `RegisterCustomOpsLibrary`.
//!
//! What they compute and how weights lie: ../FORMAT.md. The numbers come from the crate of kernels, which knows nothing
//! of ONNX Runtime; here are shapes, threads and errors.

mod ahead;
mod attention;
mod moe;
mod ort;
mod projection;
mod round;
mod schedule;

use std::ffi::{CStr, CString, c_char};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};

use phimoe_kernels::{Half, Kernels};

use ort_sys::{
    OrtApi, OrtApiBase, OrtCustomOp, OrtCustomOpDomain, OrtErrorCode, OrtLoggingLevel, OrtSessionOptions, OrtStatusPtr,
};

const DOMAIN: &CStr = c"phimoe.native";

static OPERATORS: [OrtCustomOp; 5] = [
    ort::custom_op::<projection::Projection>(),
    ort::custom_op::<moe::SparseMixerMoe>(),
    ort::custom_op::<attention::Attention<f32>>(),
    ort::custom_op::<attention::Attention<Half>>(),
    ort::custom_op::<attention::Attention<i8>>(),
];

/// The name of the kernels that run in this process, such as "avx2", or why none do.
#[unsafe(no_mangle)]
pub extern "C" fn phimoe_native_kernels() -> *const c_char {
    static NAME: OnceLock<CString> = OnceLock::new();
    let name = || Kernels::detect().map_or_else(|error| error.to_string(), |kernels| kernels.name().to_owned());
    NAME.get_or_init(|| CString::new(name()).unwrap_or_default()).as_ptr()
}

/// A domain for each ONNX Runtime in the process, as the address of its functions and of the domain. They are never
/// released: sessions read them as long as they live.
static DOMAINS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Makes the operators known to the sessions of `options`.
///
/// # Safety
/// ONNX Runtime calls this, with what is its own.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: ONNX Runtime's own tables, which live as long as the process; making a status is the first function of
    // every release.
    unsafe {
        let api = ((*base).GetApi)(ort_sys::ORT_API_VERSION);
        if api.is_null() {
            let text = c"phimoe.native needs ONNX Runtime 1.17 or newer";
            let oldest = ((*base).GetApi)(1);
            return ((*oldest).CreateStatus)(OrtErrorCode::ORT_NOT_IMPLEMENTED, text.as_ptr());
        }
        match domain(&*api) {
            Ok(domain) => ((*api).AddCustomOpDomain)(options, domain),
            Err(status) => status,
        }
    }
}

fn domain(api: &'static OrtApi) -> Result<*mut OrtCustomOpDomain, OrtStatusPtr> {
    let mut domains = DOMAINS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let key = std::ptr::from_ref(api) as usize;
    if let Some((_, known)) = domains.iter().find(|(owner, _)| *owner == key) {
        return Ok(*known as *mut OrtCustomOpDomain);
    }
    let mut domain = null_mut();
    // SAFETY: the name and the operators are static, and ONNX Runtime keeps the addresses of the latter alone.
    unsafe {
        made((api.CreateCustomOpDomain)(DOMAIN.as_ptr(), &mut domain))?;
        for operator in &OPERATORS {
            made((api.CustomOpDomain_Add)(domain, operator))?;
        }
    }
    enter(api, domain)?;
    domains.push((key, domain as usize));
    Ok(domain)
}

/// What ONNX Runtime's functions return, as a result.
fn made(status: OrtStatusPtr) -> Result<(), OrtStatusPtr> {
    if status.0.is_null() { Ok(()) } else { Err(status) }
}

/// A model that returns its input, one float32: ir_version 7, graph "g" with the input and output "x", opset 13.
const IDENTITY: &[u8] = b"\x08\x07:\x1d\x12\x01g\
    Z\x0b\n\x01x\x12\x06\n\x04\x08\x01\x12\x00\
    b\x0b\n\x01x\x12\x06\n\x04\x08\x01\x12\x00\
    B\x04\n\x00\x10\r";

/// Makes a first session with the domain, and lets it go.
///
/// A session writes the domain's name into a table of the process if it is not there, and ONNX Runtime does not lock the
/// two steps: of two first sessions at once, one fails with "the domain is already exist". After this one it is there.
fn enter(api: &OrtApi, domain: *mut OrtCustomOpDomain) -> Result<(), OrtStatusPtr> {
    let (mut environment, mut options, mut session) = (null_mut(), null_mut(), null_mut());
    // SAFETY: what is made here is let go here (a null pointer is nothing to let go), and the model is static. The
    // environment is the process's own, which counts who has it.
    unsafe {
        let outcome = (|| {
            let level = OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING;
            made((api.CreateEnv)(level, DOMAIN.as_ptr(), &mut environment))?;
            made((api.CreateSessionOptions)(&mut options))?;
            made((api.SetIntraOpNumThreads)(options, 1))?;
            made((api.AddCustomOpDomain)(options, domain))?;
            let (model, length) = (IDENTITY.as_ptr().cast(), IDENTITY.len());
            made((api.CreateSessionFromArray)(environment, model, length, options, &mut session))
        })();
        (api.ReleaseSession)(session);
        (api.ReleaseSessionOptions)(options);
        (api.ReleaseEnv)(environment);
        outcome
    }
}
