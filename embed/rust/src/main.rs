//! Continues a prompt with a bundle of phimoe-export, greedily: ONNX Runtime, a tokenizer and a JSON parser, as spec/embedding.md
//! says. The letters of the shapes are that page's.

use std::collections::HashMap;
use std::{env, fs, path::Path, process};

use ort::logging::LogLevel;
use ort::memory::{Allocator, MemoryInfo};
use ort::session::Session;
use ort::value::{DynTensor, DynValue, Tensor, TensorElementType};
use serde::Deserialize;
use tokenizers::{Result, Tokenizer};

/// What of manifest.json a greedy loop needs.
#[derive(Deserialize)]
struct Manifest {
    format_version: u32,
    task: String,
    graphs: Vec<Graph>,
    decoding: Decoding,
    chat: Option<ChatFormat>,
}

#[derive(Deserialize)]
struct Graph {
    file: String,
}

#[derive(Deserialize)]
struct Decoding {
    context: usize,
    rope_boundary: Option<usize>,
    prefill_chunk: usize,
    eos_token_ids: Vec<u32>,
    hidden_tokens: HashMap<String, u32>,
    cache: CacheShape,
}

#[derive(Deserialize)]
struct CacheShape {
    num_hidden_layers: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    dtype: String,
    shared: bool,
}

#[derive(Deserialize)]
struct ChatFormat {
    turns: HashMap<String, (String, String)>,
    generation: String,
}

/// The graph, and what one row holds in its cache.
struct Decoder {
    session: Session,
    decoding: Decoding,
    capacity: usize,
    cache: Vec<(String, DynValue)>,
    held: Vec<u32>,
}

impl Decoder {
    /// Holds `ids` and nothing else; returns the logits after the last one. `length` chooses the rope factors.
    fn prefill(&mut self, ids: &[u32], length: usize) -> Result<Vec<f32>> {
        self.held.clear();
        if self.cache.is_empty() || !self.decoding.cache.shared {
            self.cache = self.empty_cache()?; // a shared one is written over
        }
        let mut logits = Vec::new();
        for chunk in ids.chunks(self.decoding.prefill_chunk) {
            logits = self.run(chunk, length)?;
        }
        Ok(logits)
    }

    /// Appends a token; returns the logits after it.
    fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        if self.decoding.rope_boundary == Some(self.held.len()) {
            let ids = self.held.clone(); // rotated by the short factors, and worth nothing now
            self.prefill(&ids, ids.len() + 1)?;
        }
        self.run(&[id], 0)
    }

    /// One pass of the graph: S new tokens behind the P held ones; returns the last one's logits.
    fn run(&mut self, ids: &[u32], length: usize) -> Result<Vec<f32>> {
        let total = self.held.len() + ids.len();
        let tokens: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let mut binding = self.session.create_binding()?;
        binding.bind_input("input_ids", &Tensor::from_array(([1, ids.len()], tokens))?)?;
        binding.bind_input("attention_mask", &Tensor::from_array(([1, total], vec![1_i64; total]))?)?;
        binding.bind_input("logits_to_keep", &Tensor::from_array(([1], vec![1_i64]))?)?;
        binding.bind_input("rope_length", &Tensor::from_array(([1], vec![length as i64]))?)?;
        binding.bind_output_to_device("logits", &MemoryInfo::default())?;
        for (name, value) in &mut self.cache {
            binding.bind_input(format!("past_key_values.{name}"), value)?;
            if self.decoding.cache.shared {
                binding.bind_output(format!("present.{name}"), value)?; // the same memory, written in place
            } else {
                binding.bind_output_to_device(format!("present.{name}"), &MemoryInfo::default())?;
            }
        }
        let mut outputs = self.session.run_binding(&binding)?;
        if !self.decoding.cache.shared {
            for (name, value) in &mut self.cache {
                *value = outputs.remove(format!("present.{name}")).ok_or("the graph has no such output")?;
            }
        }
        self.held.extend(ids);
        Ok(outputs["logits"].try_extract_tensor::<f32>()?.1.to_vec())
    }

    fn empty_cache(&self) -> Result<Vec<(String, DynValue)>> {
        let cache = &self.decoding.cache;
        let dtype = match cache.dtype.as_str() {
            "float32" => TensorElementType::Float32,
            "float16" => TensorElementType::Float16,
            "int8" => TensorElementType::Int8,
            "uint8" => TensorElementType::Uint8,
            other => return Err(format!("manifest.json: the cache's dtype is {other}, which this program does not know").into()),
        };
        let shape = [1, cache.num_key_value_heads, if cache.shared { self.capacity } else { 0 }, cache.head_dim];
        let names = (0..cache.num_hidden_layers).flat_map(|layer| [format!("{layer}.key"), format!("{layer}.value")]);
        names.map(|name| Ok((name, DynTensor::new(&Allocator::default(), dtype, shape)?.into_dyn()))).collect()
    }
}

/// The text of `ids` behind `prompt`: a decoder strips the space before a text's first word, so a fixed word goes before it.
fn decode(tokenizer: &Tokenizer, hidden: &HashMap<String, u32>, prompt: &[u32], ids: &[u32]) -> Result<String> {
    let is_hidden = |id: &u32| hidden.values().any(|other| other == id);
    let text: Vec<u32> = ids.iter().copied().filter(|id| !is_hidden(id)).collect();
    if prompt.last().is_none_or(is_hidden) {
        return tokenizer.decode(&text, false);
    }
    let anchor = tokenizer.encode("a", false)?.get_ids().to_vec();
    let before = tokenizer.decode(&anchor, false)?.len();
    Ok(tokenizer.decode(&[anchor, text].concat(), false)?[before..].to_string())
}

fn main() {
    if let Err(error) = generate() {
        eprintln!("error: {error}");
        process::exit(1);
    }
}

fn generate() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (chat, rest) = match arguments.split_first() {
        Some((first, rest)) if first == "--chat" => (true, rest),
        _ => (false, &arguments[..]),
    };
    let [bundle, prompt, limit] = rest else { return Err("usage: phimoe-generate [--chat] BUNDLE PROMPT MAX_NEW_TOKENS".into()) };
    let (folder, limit) = (Path::new(bundle), limit.parse::<usize>()?);
    let text = fs::read_to_string(folder.join("manifest.json")).map_err(|error| format!("{bundle}/manifest.json: {error}"))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|error| format!("{bundle}/manifest.json: {error}"))?;
    if (manifest.format_version, manifest.task.as_str()) != (1, "text-generation") {
        return Err(format!("{bundle}: expected a text-generation bundle of format 1").into());
    }
    let tokenizer =
        Tokenizer::from_file(folder.join("tokenizer.json")).map_err(|error| format!("{bundle}/tokenizer.json: {error}"))?;
    let text = match (chat, &manifest.chat) {
        (false, _) => prompt.clone(),
        (true, Some(format)) => {
            let (prefix, suffix) = &format.turns["user"];
            format!("{prefix}{prompt}{suffix}{}", format.generation)
        }
        (true, None) => return Err("the bundle has no chat format; give the prompt as it is".into()),
    };
    let ids = tokenizer.encode(text, !chat)?.get_ids().to_vec();
    let (prompt, context) = (ids.len(), manifest.decoding.context);
    if prompt == 0 || limit == 0 || prompt + limit > context {
        return Err(
            format!("{prompt} tokens of a prompt and {limit} new ones: expected 1 or more each, in all up to {context}").into()
        );
    }
    let library = env::var("ORT_DYLIB_PATH").map_err(|_| "set ORT_DYLIB_PATH to ONNX Runtime's library, libonnxruntime.so")?;
    let ort = ort::init_from(library)?.build()?;
    ort.set_log_level(LogLevel::Error); // a warning says that the optional inputs are optional
    let load = |graph: &Graph| Session::builder(&ort)?.commit_from_file(folder.join(&graph.file));
    let none = Err(ort::Error::new("the bundle has no graph"));
    let session = manifest.graphs.iter().fold(none, |session, graph| session.or_else(|_| load(graph)))?; // the first that loads
    let (cache, held, mut new) = (Vec::new(), Vec::new(), Vec::new());
    let mut decoder = Decoder { session, decoding: manifest.decoding, capacity: prompt + limit, cache, held };
    let mut logits = decoder.prefill(&ids, prompt)?;
    loop {
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])); // of equals the first
        let token = best.ok_or("the graph gave no logits")? as u32;
        new.push(token);
        if new.len() == limit || decoder.decoding.eos_token_ids.contains(&token) {
            break;
        }
        logits = decoder.step(token)?;
    }
    println!("{}", decode(&tokenizer, &decoder.decoding.hidden_tokens, &ids, &new)?);
    eprintln!("{}", serde_json::to_string(&new)?);
    Ok(())
}
