//! Continues a prompt with a bundle of phimoe-export, greedily: ONNX Runtime, a tokenizer and a JSON parser, as
//! spec/embedding.md says. `HELP` below says how it is used.

mod arguments;
mod decoder;
mod errors;
mod external_data;
mod files;
mod manifest;
mod operators;
mod session;
mod tokenizer;

use std::io::{self, Write};
use std::{env, path::Path, process};

use arguments::{Arguments, Form, HELP, USAGE};
use decoder::Decoder;
use errors::{Error, Result};
use tokenizer::{Message, Prompt, Tokenizer};

fn main() {
    session::turn_telemetry_off();
    let arguments = match arguments::parse(env::args_os().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => finish(HELP, ""),
        Err(what) => fail(2, &format!("{what}\n{USAGE}")),
    };
    match generate(&arguments) {
        Ok((text, ids)) => finish(&format!("{text}\n"), &format!("{ids:?}\n")),
        Err(error) => fail(1, &error.to_string()),
    }
}

/// Writes what is asked for; whoever reads may be gone, and a disk may be full.
fn finish(output: &str, details: &str) -> ! {
    let written = io::stdout().write_all(output.as_bytes()).and_then(|()| io::stdout().flush());
    match written {
        Ok(()) => {
            let _ = io::stderr().write_all(details.as_bytes());
            process::exit(0)
        }
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(1),
        Err(error) => fail(1, &format!("standard output cannot be written ({error})")),
    }
}

fn fail(code: i32, what: &str) -> ! {
    let _ = writeln!(io::stderr(), "{what}");
    process::exit(code)
}

/// The text that follows a prompt, and its token ids with the one that ended it.
fn generate(arguments: &Arguments) -> Result<(String, Vec<u32>)> {
    let folder = Path::new(&arguments.bundle);
    let threads = arguments.threads.as_deref().map(session::check_threads).transpose()?;
    let operators = operators::find(arguments.operators.as_deref())?;
    let (manifest, (tokenizer, sessions)) = files::unchanged(folder, |manifest| {
        files::check_files(folder, manifest)?;
        let tokenizer = Tokenizer::load(folder)?;
        Ok((tokenizer, session::open_sessions(folder, manifest, threads, operators.as_deref())?))
    })?;
    let prompt = tokenizer.encode(&read_prompt(arguments)?, &manifest)?;
    let max_new_tokens = check_room(prompt.len(), &arguments.max_new_tokens, manifest.decoding.context)?;

    let eos = &manifest.decoding.eos_token_ids;
    let mut decoder = Decoder::new(sessions, &manifest.decoding, prompt.len() + max_new_tokens);
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

fn read_prompt(Arguments { form, prompt, .. }: &Arguments) -> Result<Prompt> {
    match form {
        Form::Text => Ok(Prompt::Text(prompt.clone())),
        Form::Chat => Ok(Prompt::Messages(vec![Message { role: "user".into(), content: prompt.clone() }])),
        Form::Json => serde_json::from_str(prompt).map_err(|error| {
            Error::Generation(format!("the prompt is none ({error}), expected a text, token ids or messages in JSON"))
        }),
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
