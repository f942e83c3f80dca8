//! ONNX Runtime, and the first graph of a bundle that it runs on the CPU.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::CStr;
use std::path::Path;
use std::thread;

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::value::{TensorElementType, ValueType};

use crate::errors::{Error, Result};
use crate::external_data::check_external_data;
use crate::manifest::{CacheDtype, Decoding, Graph, MANIFEST, Manifest, NATIVE_OPERATORS, Release};
use crate::operators::LACKING;

const DEVICE: &str = "cpu";
const TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

const SPIN: &str = "50"; // microseconds: threads that wait longer take the processor from each other on a busy machine
const SMALL_PASS: u64 = 8_000_000; // bytes of weights times tokens; too short to be worth waking other threads
const MOST_THREADS: usize = 256; // or the number of processors, where that is more; a million would hang the machine

type Shape = Vec<Option<i64>>; // None is any
type Tensors = BTreeMap<String, (TensorElementType, Shape)>;

/// The bundle's graph, open once or twice: a cache is no session's own, and the numbers are the same in both.
pub struct Sessions {
    large: Session,
    small: Option<Session>, // of one thread
    weights: u64,
}

impl Sessions {
    /// The session for a pass over so many new tokens.
    pub fn for_pass(&mut self, tokens: usize) -> &mut Session {
        match &mut self.small {
            Some(small) if (tokens as u64).saturating_mul(self.weights) <= SMALL_PASS => small,
            _ => &mut self.large,
        }
    }
}

/// Opens the graph over the library that ORT_DYLIB_PATH names, with so many threads for an operator; without a number
/// small passes run in one, others in as many as ONNX Runtime chooses. `operators` is the library of the native ones, where
/// there is one. A `DeviceError` where no graph runs here, a `BundleError` where the graph is not the one that the
/// manifest describes.
pub fn open_sessions(
    folder: &Path,
    manifest: &Manifest,
    threads: Option<usize>,
    operators: Option<&Path>,
) -> Result<Sessions> {
    let library = env::var("ORT_DYLIB_PATH").map_err(|_| {
        Error::Device(
            "ORT_DYLIB_PATH is not set, expected the path of ONNX Runtime's library, libonnxruntime.so".into(),
        )
    })?;
    let graph = choose_graph(manifest, &installed(&library)?, operators.is_some())?;
    let operators = operators.filter(|_| graph.requires.iter().any(|name| name == NATIVE_OPERATORS));
    let path = folder.join(&graph.file.0);
    check_external_data(&path, manifest)?;
    let environment =
        ort::init_from(&library).map_err(|error| Error::Device(format!("{library}: {error}")))?.build()?;
    environment.set_log_level(LogLevel::Error); // a warning says that the optional inputs are optional
    let data = manifest.files.iter().filter(|(name, _)| name.0.ends_with(".data"));
    let weights = data.fold(0, |sum: u64, (_, file)| sum.saturating_add(file.size));
    let large = open(&environment, &path, threads.unwrap_or(0), operators)?;
    check_agreement(&large, graph, &manifest.decoding)?;
    let twice = threads.is_none() && weights <= SMALL_PASS;
    let small = if twice { Some(open(&environment, &path, 1, operators)?) } else { None };
    Ok(Sessions { large, small, weights })
}

/// 0 threads are ONNX Runtime's own choice.
fn open(environment: &Environment, path: &Path, threads: usize, operators: Option<&Path>) -> Result<Session> {
    let mut builder = Session::builder(environment)?
        .with_config_entry("session.load_model_format", "ONNX")? // by any name: external_data.rs knows this one
        .with_config_entry("session.intra_op.spin_duration_us", SPIN)?
        .with_intra_threads(threads)?;
    if let Some(library) = operators {
        builder = builder.with_operator_library(library).map_err(|error| {
            let what = "is no library of the native operators";
            Error::Device(format!("{}: {what} ({error}); build it again (docs/native.md)", library.display()))
        })?;
    }
    builder.commit_from_file(path).map_err(|error| {
        Error::Device(format!("{}: ONNX Runtime refuses it ({error}); export the bundle again", path.display()))
    })
}

/// A number of threads that this machine bears.
pub fn check_threads(text: &str) -> Result<usize> {
    let most = MOST_THREADS.max(thread::available_parallelism().map_or(1, Into::into));
    match text.parse() {
        Ok(threads) if (1..=most).contains(&threads) => Ok(threads),
        _ => Err(Error::Device(format!("threads is {text}, expected an integer from 1 to {most}"))),
    }
}

/// Keeps ONNX Runtime from writing about this machine, unless the variable is set already. To be called while the
/// process has one thread, and before the library is loaded: it looks at the environment once.
pub fn turn_telemetry_off() {
    if env::var_os(TELEMETRY).is_none() {
        // SAFETY: there is no other thread.
        unsafe { env::set_var(TELEMETRY, "1") };
    }
}

/// The release of ONNX Runtime's library, which it says before a session is made.
fn installed(library: &str) -> Result<Release> {
    let say = |what: String| Error::Device(format!("{library}: is no library of ONNX Runtime ({what})"));
    // SAFETY: the name and the signature are those of onnxruntime_c_api.h; the library is ONNX Runtime's by the user's word.
    let text = unsafe {
        let library = libloading::Library::new(library).map_err(|error| say(error.to_string()))?;
        let base = library
            .get::<unsafe extern "system" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase")
            .map_err(|error| say(error.to_string()))?();
        CStr::from_ptr(((*base).GetVersionString)()).to_string_lossy().into_owned()
    };
    let release = text.split(['-', '+']).next().unwrap_or_default(); // "1.33.0-dev" is nearly 1.33.0
    Release::try_from(release.to_string()).map_err(say)
}

fn choose_graph<'a>(manifest: &'a Manifest, installed: &Release, native: bool) -> Result<&'a Graph> {
    let graphs: Vec<&Graph> = manifest.graphs.iter().filter(|graph| graph.devices.contains_key(DEVICE)).collect();
    if graphs.is_empty() {
        let devices: Vec<&str> =
            manifest.graphs.iter().flat_map(|graph| graph.devices.keys().map(String::as_str)).collect();
        let devices = devices.join(", ");
        return Err(Error::Device(format!(
            "the bundle runs on {devices}, not on {DEVICE}; export it with --target {DEVICE}"
        )));
    }
    let unknown = |graph: &Graph| graph.requires.iter().find(|name| !native || *name != NATIVE_OPERATORS).cloned();
    let known: Vec<&Graph> = graphs.iter().copied().filter(|graph| unknown(graph).is_none()).collect();
    if known.is_empty() {
        let names: BTreeSet<String> = graphs.iter().filter_map(|graph| unknown(graph)).collect();
        if names.iter().all(|name| name == NATIVE_OPERATORS) {
            return Err(Error::Device(format!("the bundle needs the native operators, {LACKING}")));
        }
        let names = Vec::from_iter(names);
        return Err(Error::Device(format!(
            "the bundle requires {}, which this program does not know",
            names.join(", ")
        )));
    }
    if let Some(graph) = known.iter().find(|graph| graph.devices[DEVICE] <= *installed) {
        return Ok(graph);
    }
    let needed = known.iter().map(|graph| &graph.devices[DEVICE]).min().map(Release::to_string).unwrap_or_default();
    Err(Error::Device(format!("the bundle needs ONNX Runtime {needed} or newer, ORT_DYLIB_PATH has {installed}")))
}

/// Holds the session's inputs and outputs against the manifest: names, dtypes, and dimensions that are numbers.
fn check_agreement(session: &Session, graph: &Graph, decoding: &Decoding) -> Result<()> {
    let say = |what: String| {
        let graph = &graph.file.0;
        Error::Bundle(format!("{MANIFEST} does not describe {graph}: {what}; export the bundle again"))
    };
    let defaults = session.overridable_initializers();
    for name in &graph.optional_inputs {
        if !defaults.iter().any(|input| input.name() == name) {
            return Err(say(format!("optional_inputs has {name}, but the graph has no such input with a default")));
        }
    }
    let required = session.inputs().iter().map(|input| (input.name(), input.dtype()));
    let optional = defaults.iter().map(|input| (input.name(), input.dtype()));
    let named = optional.filter(|(name, _)| graph.optional_inputs.iter().any(|other| other == name));
    let found: BTreeMap<&str, &ValueType> = required.chain(named).collect();
    // counted before any names are made: a damaged manifest may claim a billion layers
    let (layers, count) = (decoding.cache.num_hidden_layers, found.len());
    if 2 * layers + 4 != count {
        let expected = 2 * layers + 4;
        return Err(say(format!(
            "num_hidden_layers is {layers}, but the graph has {count} inputs, expected {expected}"
        )));
    }
    check_tensors("inputs", &found, &expected_inputs(decoding)).map_err(say)?;
    let found = session.outputs().iter().map(|output| (output.name(), output.dtype())).collect();
    check_tensors("outputs", &found, &expected_outputs(decoding)).map_err(say)
}

fn check_tensors(
    what: &str,
    found: &BTreeMap<&str, &ValueType>,
    expected: &Tensors,
) -> std::result::Result<(), String> {
    if let Some(name) = found.keys().find(|name| !expected.contains_key(**name)) {
        return Err(format!("the graph's {what} have {name}, which is unknown"));
    }
    for (name, (dtype, shape)) in expected {
        let value = found.get(name.as_str()).ok_or_else(|| format!("the graph's {what} lack {name}"))?;
        let ValueType::Tensor { ty, shape: has, .. } = value else {
            return Err(format!("{name} is no tensor in the graph"));
        };
        if ty != dtype {
            return Err(format!("the dtype of {name} is {ty:?} in the graph, expected {dtype:?}"));
        }
        let agrees = |(has, wanted): (&i64, &Option<i64>)| wanted.is_none_or(|wanted| *has == -1 || *has == wanted);
        if has.len() != shape.len() || !has.iter().zip(shape).all(agrees) {
            let keys = if name == "logits" { "vocab_size" } else { "num_key_value_heads and head_dim" };
            return Err(format!(
                "{name} has the shape {has:?} in the graph, expected {shape:?} by {keys}, None is any"
            ));
        }
    }
    Ok(())
}

fn expected_inputs(decoding: &Decoding) -> Tensors {
    let mut inputs = cache("past_key_values", decoding);
    for name in ["input_ids", "attention_mask"] {
        inputs.insert(name.into(), (TensorElementType::Int64, vec![None, None]));
    }
    for name in ["logits_to_keep", "rope_length"] {
        inputs.insert(name.into(), (TensorElementType::Int64, vec![Some(1)]));
    }
    inputs
}

fn expected_outputs(decoding: &Decoding) -> Tensors {
    let mut outputs = cache("present", decoding);
    let shape = vec![None, None, Some(decoding.vocab_size as i64)];
    outputs.insert("logits".into(), (TensorElementType::Float32, shape));
    outputs
}

fn cache(prefix: &str, decoding: &Decoding) -> Tensors {
    let cache = &decoding.cache;
    let shape = [None, Some(cache.num_key_value_heads as i64), None, Some(cache.head_dim as i64)];
    let names = cache_names(cache.num_hidden_layers);
    names.map(|name| (format!("{prefix}.{name}"), (element_type(cache.dtype), shape.to_vec()))).collect()
}

/// "0.key", "0.value", "1.key" and so on, in graph order.
pub fn cache_names(num_hidden_layers: usize) -> impl Iterator<Item = String> {
    (0..num_hidden_layers).flat_map(|layer| [format!("{layer}.key"), format!("{layer}.value")])
}

pub fn element_type(dtype: CacheDtype) -> TensorElementType {
    match dtype {
        CacheDtype::Float32 => TensorElementType::Float32,
        CacheDtype::Float16 => TensorElementType::Float16,
        CacheDtype::Bfloat16 => TensorElementType::Bfloat16,
        CacheDtype::Int8 => TensorElementType::Int8,
        CacheDtype::Uint8 => TensorElementType::Uint8,
    }
}
