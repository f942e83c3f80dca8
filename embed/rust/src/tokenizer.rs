//! Prompts to token ids, and token ids to text.

use std::panic;
use std::path::Path;

use serde::Deserialize;
use tokenizers::Tokenizer as Library;

use crate::errors::{Error, Result};
use crate::manifest::{ChatFormat, Decoding, Manifest, TOKENIZER};

const BROKEN: char = '\u{FFFD}'; // what half a character decodes to

/// A text, token ids or messages.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<i64>),
    Messages(Vec<Message>),
}

#[derive(Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

pub struct Tokenizer {
    library: Library,
}

impl Tokenizer {
    /// Reads tokenizer.json; a `BundleError` where it cannot be read.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER);
        let say = |what: String| Error::Bundle(format!("{}: is no tokenizer ({what})", path.display()));
        // the library panics over some damaged files, where they are used at the latest
        let read = || {
            let mut library = Library::from_file(&path).map_err(|error| error.to_string())?;
            library.with_truncation(None).map_err(|error| error.to_string())?.with_padding(None);
            library.encode("a", true).map_err(|error| error.to_string())?;
            Ok::<_, String>(library)
        };
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|_| {})); // it says itself what is wrong
        let library = panic::catch_unwind(read);
        panic::set_hook(hook);
        let library = library.map_err(|_| say("it is damaged".into()))?.map_err(say)?;
        Ok(Tokenizer { library })
    }

    /// The token ids of a prompt; a `GenerationError` where it is empty or not one of the bundle.
    pub fn encode(&self, prompt: &Prompt, manifest: &Manifest) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.known_ids(text, true, manifest),
            Prompt::Messages(messages) => self.known_ids(&render(messages, manifest.chat.as_ref())?, false, manifest),
            Prompt::Tokens(ids) => ids.iter().map(|&id| token_id(id, manifest.decoding.vocab_size)).collect(),
        }
    }

    /// The ids of a text, all of which the model has.
    fn known_ids(&self, text: &str, special: bool, manifest: &Manifest) -> Result<Vec<u32>> {
        let ids = self.ids(text, special)?;
        ids.into_iter().map(|id| token_id(id.into(), manifest.decoding.vocab_size)).collect()
    }

    /// The text of `new` tokens behind `prompt`, without hidden tokens and without half a character at its end.
    pub fn decode(&self, decoding: &Decoding, prompt: &[u32], new: &[u32]) -> Result<String> {
        let hidden = |id: u32| decoding.hidden_tokens.values().any(|other| other.0 == id);
        // the bytes of a character that the prompt ends inside of wait for the rest
        let mut start = prompt.len();
        while start > 0 && !hidden(prompt[start - 1]) && self.text(&prompt[start - 1..start])?.ends_with(BROKEN) {
            start -= 1;
        }
        // a decoder strips the space before a text's first word, so a fixed word goes before one that follows others
        let before = self.ids("a", false)?;
        let skipped = self.text(&before)?.len();
        let mut follows = prompt.last().is_some_and(|&id| !hidden(id));
        let (mut text, mut waiting) = (String::new(), Vec::new());
        // piece by piece: beside bytes that are no character, the decoder takes those of whole ones for none either
        for (place, &id) in prompt[start..].iter().chain(new.iter().filter(|&&id| !hidden(id))).enumerate() {
            waiting.push(id);
            let piece = if follows {
                let piece = self.text(&[&before[..], &waiting[..]].concat())?;
                piece.get(skipped..).unwrap_or_default().to_string()
            } else {
                self.text(&waiting)?
            };
            if !piece.ends_with(BROKEN) {
                waiting.clear();
                follows = true;
                text += if place < prompt.len() - start { "" } else { &piece };
            }
        }
        Ok(if decoding.clean_up_tokenization_spaces { clean_up(&text) } else { text })
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.library.encode(text, special).map_err(|error| Error::Generation(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn text(&self, ids: &[u32]) -> Result<String> {
        self.library.decode(ids, false).map_err(|error| Error::Generation(error.to_string()))
    }
}

/// The text without the spaces before punctuation: each replacement over the whole text, one after the other.
fn clean_up(text: &str) -> String {
    let shortened = [" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"];
    let replace = |text: String, old: &str| text.replace(old, old.trim_start());
    let text = shortened[..4].iter().fold(text.to_string(), |text, old| replace(text, old)).replace(" ' ", "'");
    shortened[4..].iter().fold(text, |text, old| replace(text, old))
}

fn token_id(id: i64, vocab_size: usize) -> Result<u32> {
    let known = u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size);
    let last = vocab_size - 1;
    known.ok_or_else(|| Error::Generation(format!("the prompt holds {id}, expected token ids from 0 to {last}")))
}

/// The text of a chat, which the answer follows.
fn render(messages: &[Message], format: Option<&ChatFormat>) -> Result<String> {
    let format = format.ok_or_else(|| {
        Error::Generation("the bundle has no chat format; give the prompt as a text, as its model expects it".into())
    })?;
    let mut text = String::new();
    for Message { role, content } in messages {
        let (prefix, suffix) = format.turns.get(role).ok_or_else(|| {
            let mut known: Vec<&str> = format.turns.keys().map(String::as_str).collect();
            known.sort_unstable();
            Error::Generation(format!("role is {role:?}, expected one of {}", known.join(", ")))
        })?;
        if !content.is_empty() || !format.skipped_when_empty.contains(role) {
            text += &format!("{prefix}{content}{suffix}");
        }
    }
    Ok(text + &format.generation)
}
