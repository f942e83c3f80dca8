//! manifest.json, versions 1 and 2. It is an untrusted file: what is read here has the types and ranges of
//! spec/embedding.md, and an error names the key.

use std::collections::{BTreeMap, HashMap};
use std::{fs, path::Path};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::{Map, Value, json};

use crate::errors::{Error, Result};

pub const MANIFEST: &str = "manifest.json";
pub const TOKENIZER: &str = "tokenizer.json";
/// What a graph of the native operators requires: their domain and its version.
pub const NATIVE_OPERATORS: &str = "phimoe.native.1";
const TASK: &str = "text-generation";

#[derive(Deserialize)]
pub struct Manifest {
    pub graphs: Vec<Graph>,
    pub files: BTreeMap<FileName, File>,
    pub decoding: Decoding,
    pub chat: Option<ChatFormat>,
}

#[derive(Deserialize)]
pub struct Graph {
    pub file: FileName,
    pub devices: BTreeMap<String, Release>,
    pub optional_inputs: Vec<String>,
    #[serde(default)]
    pub requires: Vec<String>,
}

#[derive(Deserialize, PartialEq)]
pub struct File {
    pub size: u64,
    #[serde(deserialize_with = "digest")]
    pub sha256: String,
}

#[derive(Deserialize)]
pub struct Decoding {
    #[serde(deserialize_with = "count")]
    pub vocab_size: usize,
    #[serde(deserialize_with = "count")]
    pub context: usize,
    #[serde(deserialize_with = "optional_count")]
    pub rope_boundary: Option<usize>,
    #[serde(deserialize_with = "count")]
    pub prefill_chunk: usize,
    pub eos_token_ids: Vec<TokenId>,
    pub hidden_tokens: HashMap<String, TokenId>,
    pub sampling_graph: Option<FileName>,
    #[serde(default)]
    pub clean_up_tokenization_spaces: bool,
    pub cache: CacheShape,
}

#[derive(Deserialize)]
pub struct CacheShape {
    #[serde(deserialize_with = "count")]
    pub num_hidden_layers: usize,
    #[serde(deserialize_with = "count")]
    pub num_key_value_heads: usize,
    #[serde(deserialize_with = "count")]
    pub head_dim: usize,
    pub dtype: CacheDtype,
    pub shared: bool,
}

#[derive(Deserialize)]
pub struct ChatFormat {
    pub turns: HashMap<String, (String, String)>,
    pub generation: String,
    pub skipped_when_empty: Vec<String>,
}

/// A plain name of a file in the bundle's folder.
#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord, Clone)]
#[serde(try_from = "String")]
pub struct FileName(pub String);

impl TryFrom<String> for FileName {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', ':', '\0']) {
            return Err(format!("{name:?} is no plain name of a file"));
        }
        Ok(FileName(name))
    }
}

/// A release of ONNX Runtime, such as "1.31"; they compare number by number.
#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord, Clone, Debug)]
#[serde(try_from = "String")]
pub struct Release(Vec<u32>);

impl TryFrom<String> for Release {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok()).flatten();
        let numbers = text.split('.').map(number).collect::<Option<_>>();
        numbers
            .map(Release)
            .ok_or_else(|| format!("{:?} is no release, expected one such as \"1.31\"", shortened(&text)))
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(u32::to_string).collect();
        formatter.write_str(&numbers.join("."))
    }
}

/// From 0 to 2147483647.
#[derive(Deserialize, PartialEq, Eq, Clone, Copy)]
#[serde(try_from = "i32")]
pub struct TokenId(pub u32);

impl TryFrom<i32> for TokenId {
    type Error = String;

    fn try_from(id: i32) -> std::result::Result<Self, String> {
        u32::try_from(id).map(TokenId).map_err(|_| format!("{id} is no token id, expected 0 to {}", i32::MAX))
    }
}

#[derive(Deserialize, Clone, Copy, Debug, PartialEq)]
#[serde(try_from = "String")]
pub enum CacheDtype {
    Float32,
    Float16,
    Bfloat16,
    Int8,
    Uint8,
}

impl TryFrom<String> for CacheDtype {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        match name.as_str() {
            "float32" => Ok(CacheDtype::Float32),
            "float16" => Ok(CacheDtype::Float16),
            "bfloat16" => Ok(CacheDtype::Bfloat16),
            "int8" => Ok(CacheDtype::Int8),
            "uint8" => Ok(CacheDtype::Uint8),
            _ => Err(format!("{name:?} is unknown, expected float32, float16, bfloat16, int8 or uint8")),
        }
    }
}

/// Reads the manifest of a bundle for text-generation; a `BundleError` where there is none or a key is not as it must be.
pub fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let say = |what: String| Error::Bundle(format!("{}: {what}", path.display()));
    if !path.is_file() {
        return Err(say("no bundle of phimoe-export (it is missing or no file)".into())); // a pipe would never end
    }
    let text = fs::read_to_string(&path).map_err(|error| say(format!("no bundle of phimoe-export ({error})")))?;
    let mut raw: Value = serde_json::from_str(&text).map_err(|error| say(format!("is no JSON ({error})")))?;
    match raw["format_version"].as_u64() {
        Some(1) => upgrade(&mut raw),
        Some(2) => {}
        _ => {
            let found = shortened(&raw["format_version"].to_string());
            return Err(say(format!(
                "format_version is {found}, expected 1 or 2; use a newer release of this program"
            )));
        }
    }
    if raw["task"] != TASK {
        let found = shortened(&raw["task"].to_string());
        return Err(say(format!("task is {found}, expected {TASK:?}")));
    }
    parse(raw).map_err(|what| say(format!("is damaged ({what}); export the bundle again")))
}

fn parse(raw: Value) -> std::result::Result<Manifest, String> {
    expect_objects(&raw)?;
    let manifest: Manifest = serde_path_to_error::deserialize(raw).map_err(|error| error.to_string())?;
    if manifest.graphs.is_empty() {
        return Err("graphs: is empty, expected one or more".into());
    }
    for (number, graph) in manifest.graphs.iter().enumerate() {
        if graph.devices.is_empty() {
            return Err(format!("graphs[{number}].devices: is empty, expected one or more"));
        }
    }
    let tokenizer = FileName(TOKENIZER.into());
    let graphs = manifest.graphs.iter().map(|graph| &graph.file);
    for file in graphs.chain(&manifest.decoding.sampling_graph).chain([&tokenizer]) {
        if !manifest.files.contains_key(file) {
            return Err(format!("files: has no {}, which is needed", file.0));
        }
    }
    Ok(manifest)
}

/// serde would take a list of the right length for an object.
fn expect_objects(raw: &Value) -> std::result::Result<(), String> {
    let mut places: Vec<String> = ["", "/files", "/decoding", "/decoding/cache"].map(String::from).into();
    if !raw["chat"].is_null() {
        places.push("/chat".into());
    }
    places.extend((0..raw["graphs"].as_array().map_or(0, Vec::len)).map(|number| format!("/graphs/{number}")));
    let files = raw["files"].as_object().into_iter().flat_map(Map::keys);
    places.extend(files.map(|name| format!("/files/{}", name.replace('~', "~0").replace('/', "~1"))));
    match places.iter().find(|place| !raw.pointer(place).is_some_and(Value::is_object)) {
        Some(place) => Err(format!("{}: is missing or no object", place.trim_start_matches('/').replace('/', "."))),
        None => Ok(()),
    }
}

/// Version 1 had one target for all graphs, and one release for each; CUDA's bundles are for no CPU here.
fn upgrade(raw: &mut Value) {
    let device = match raw["target"].as_str() {
        Some("cpu" | "portable") => "cpu".into(),
        target => target.unwrap_or("an unknown target").to_string(),
    };
    for graph in raw["graphs"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        let release = graph.get("minimum_onnxruntime").cloned();
        graph.insert("devices".into(), json!({ &device: release }));
    }
}

fn count<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    match i32::deserialize(deserializer)? {
        number if number > 0 => Ok(number as usize),
        number => Err(D::Error::custom(format!("is {number}, expected 1 to {}", i32::MAX))),
    }
}

fn optional_count<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    match Option::<i32>::deserialize(deserializer)? {
        Some(number) if number <= 0 => Err(D::Error::custom(format!("is {number}, expected 1 to {}", i32::MAX))),
        number => Ok(number.map(|number| number as usize)),
    }
}

fn digest<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(text);
    }
    Err(D::Error::custom(format!("{:?} is no SHA-256, expected 64 digits from 0 to f", shortened(&text))))
}

/// Enough of what was found for a message.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}
