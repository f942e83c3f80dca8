//! Continues a prompt with a bundle of phimoe-export, greedily: ONNX Runtime, a tokenizer and a JSON parser, as
//! spec/embedding.md says.
//!
//!     phimoe-generate [--chat | --json] BUNDLE PROMPT MAX_NEW_TOKENS
//!
//! PROMPT is a text, with --chat a user's message, with --json a text, token ids or messages in JSON. The text goes to
//! stdout; its token ids go to stderr, or what is wrong.

mod decoder;
mod errors;
mod external_data;
mod files;
mod manifest;
mod session;
mod tokenizer;

use std::{env, path::Path, process};

use decoder::Decoder;
use errors::{Error, Result};
use tokenizer::{Message, Prompt, Tokenizer};

const USAGE: &str = "usage: phimoe-generate [--chat | --json] BUNDLE PROMPT MAX_NEW_TOKENS";

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (form, rest) = match arguments.split_first() {
        Some((first, rest)) if first.starts_with("--") => (first.as_str(), rest),
        _ => ("", &arguments[..]),
    };
    let ([bundle, text, limit], "" | "--chat" | "--json") = (rest, form) else {
        eprintln!("{USAGE}");
        process::exit(2);
    };
    match generate(Path::new(bundle), form, text, limit) {
        Ok((text, ids)) => {
            println!("{text}");
            eprintln!("{ids:?}");
        }
        Err(error) => {
            eprintln!("{error}");
            process::exit(1);
        }
    }
}

/// The text that follows a prompt, and its token ids with the one that ended it.
fn generate(folder: &Path, form: &str, text: &str, limit: &str) -> Result<(String, Vec<u32>)> {
    let manifest = manifest::read_manifest(folder)?;
    files::check_files(folder, &manifest)?;
    let tokenizer = Tokenizer::load(folder)?;
    let session = session::open_session(folder, &manifest)?;
    let prompt = tokenizer.encode(&read_prompt(form, text)?, &manifest)?;
    let max_new_tokens = check_room(prompt.len(), limit, manifest.decoding.context)?;

    let eos = &manifest.decoding.eos_token_ids;
    let mut decoder = Decoder::new(session, &manifest.decoding, prompt.len() + max_new_tokens);
    let mut logits = decoder.prefill(&prompt, prompt.len())?;
    let mut new = Vec::new();
    loop {
        let token = most_likely(&logits)?;
        new.push(token);
        let ended = eos.iter().any(|id| id.0 == token);
        if ended || new.len() == max_new_tokens {
            let text = tokenizer.decode(&manifest.decoding, &prompt, &new[..new.len() - usize::from(ended)])?;
            return Ok((text, new));
        }
        logits = decoder.step(token)?;
    }
}

fn read_prompt(form: &str, text: &str) -> Result<Prompt> {
    match form {
        "--chat" => Ok(Prompt::Messages(vec![Message { role: "user".into(), content: text.into() }])),
        "--json" => serde_json::from_str(text).map_err(|error| {
            Error::Generation(format!("the prompt is none ({error}), expected a text, token ids or messages in JSON"))
        }),
        _ => Ok(Prompt::Text(text.into())),
    }
}

fn check_room(prompt: usize, limit: &str, context: usize) -> Result<usize> {
    let max_new_tokens = limit.parse().unwrap_or(0);
    if prompt == 0 {
        return Err(Error::Generation("the prompt is empty; give at least one character, message or token".into()));
    }
    if max_new_tokens == 0 {
        return Err(Error::Generation(format!("max_new_tokens is {limit}, expected 1 or more")));
    }
    if max_new_tokens > context.saturating_sub(prompt) {
        return Err(Error::Generation(format!(
            "the prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, together more than the context of \
             {context}; shorten one of them"
        )));
    }
    Ok(max_new_tokens)
}

/// Of equals the first.
fn most_likely(logits: &[f32]) -> Result<u32> {
    if !logits.iter().all(|logit| logit.is_finite()) {
        return Err(Error::Generation("the graph's logits are not finite; check the bundle with phimoe-verify".into()));
    }
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.map(|id| id as u32).ok_or_else(|| Error::Generation("the graph gave no logits".into()))
}
