//! One row's cache, and how it goes on. The letters of the shapes are spec/embedding.md's.

use ort::memory::{Allocator, MemoryInfo};
use ort::value::{DynTensor, DynValue, Tensor};

use crate::errors::{Error, Result};
use crate::manifest::Decoding;
use crate::session::{Sessions, cache_names, element_type};

/// The graph, and the tokens that the row holds in its cache.
pub struct Decoder<'a> {
    sessions: Sessions,
    decoding: &'a Decoding,
    capacity: usize,
    cache: Vec<(String, DynValue)>,
    tokens: Vec<u32>,
}

impl<'a> Decoder<'a> {
    /// Holds nothing yet; `capacity` is the most tokens that it will.
    pub fn new(sessions: Sessions, decoding: &'a Decoding, capacity: usize) -> Self {
        Decoder { sessions, decoding, capacity, cache: Vec::new(), tokens: Vec::new() }
    }

    /// Holds `ids` and nothing else; returns the logits [V] after the last one. `rope_length` chooses the rope factors.
    pub fn prefill(&mut self, ids: &[u32], rope_length: usize) -> Result<Vec<f32>> {
        self.tokens.clear();
        if self.cache.is_empty() || !self.decoding.cache.shared {
            self.cache = self.empty_cache()?; // a shared one is written over
        }
        let mut logits = Vec::new();
        for chunk in ids.chunks(self.decoding.prefill_chunk) {
            logits = self.run(chunk, rope_length)?;
        }
        Ok(logits)
    }

    /// Appends a token; returns the logits [V] after it.
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        if self.decoding.rope_boundary == Some(self.tokens.len()) {
            let ids = self.tokens.clone(); // rotated by the short factors, and worth nothing now
            self.prefill(&ids, ids.len() + 1)?;
        }
        self.run(&[id], 0)
    }

    /// One pass of the graph: S new tokens behind the P held ones; returns the last one's logits.
    fn run(&mut self, ids: &[u32], rope_length: usize) -> Result<Vec<f32>> {
        let total = self.tokens.len() + ids.len();
        let new: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let session = self.sessions.for_pass(ids.len());
        let mut binding = session.create_binding()?;
        binding.bind_input("input_ids", &Tensor::from_array(([1, ids.len()], new))?)?;
        binding.bind_input("attention_mask", &Tensor::from_array(([1, total], vec![1_i64; total]))?)?;
        binding.bind_input("logits_to_keep", &Tensor::from_array(([1], vec![1_i64]))?)?;
        binding.bind_input("rope_length", &Tensor::from_array(([1], vec![rope_length as i64]))?)?;
        binding.bind_output_to_device("logits", &MemoryInfo::default())?;
        for (name, value) in &mut self.cache {
            binding.bind_input(format!("past_key_values.{name}"), value)?;
            if self.decoding.cache.shared {
                binding.bind_output(format!("present.{name}"), value)?; // the same memory, written in place
            } else {
                binding.bind_output_to_device(format!("present.{name}"), &MemoryInfo::default())?;
            }
        }
        let mut outputs = session.run_binding(&binding)?;
        if !self.decoding.cache.shared {
            for (name, value) in &mut self.cache {
                let present = outputs.remove(format!("present.{name}"));
                *value = present.ok_or_else(|| Error::Generation(format!("the graph gave no present.{name}")))?;
            }
        }
        self.tokens.extend(ids);
        Ok(outputs["logits"].try_extract_tensor::<f32>()?.1.to_vec())
    }

    fn empty_cache(&self) -> Result<Vec<(String, DynValue)>> {
        let cache = &self.decoding.cache;
        let length = if cache.shared { self.capacity } else { 0 };
        let shape = [1, cache.num_key_value_heads, length, cache.head_dim];
        let empty = || DynTensor::new(&Allocator::default(), element_type(cache.dtype), shape);
        cache_names(cache.num_hidden_layers).map(|name| Ok((name, empty()?.into_dyn()))).collect()
    }
}
