//! Which files a graph reads its weights from, found in the graph's own bytes before ONNX Runtime opens them: it opens
//! whatever a location names, "../x" and absolute paths too.
//!
//! An ONNX file is a Protocol Buffers message (https://protobuf.dev/programming-guides/encoding/) of the fields in
//! onnx.proto3; this walks those in which tensors can be, and no others.

use std::fs;
use std::path::Path;

use crate::errors::{Error, Result};
use crate::manifest::{FileName, MANIFEST, Manifest};

const DEEPEST: usize = 100; // messages inside each other, as Protocol Buffers' own parsers allow
const LOCATION: &[u8] = b"location";

/// The messages that lead to a location.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Function,
    Graph,
    Node,
    Attribute,
    SparseTensor,
    Tensor,
    Entry,
}

impl Message {
    /// The message that a field of this number holds, where it leads on.
    fn inner(self, field: u64) -> Option<Message> {
        match (self, field) {
            (Message::Model, 7) | (Message::Attribute, 6 | 11) => Some(Message::Graph),
            (Message::Model, 25) => Some(Message::Function),
            (Message::Function, 7) | (Message::Graph, 1) => Some(Message::Node),
            (Message::Function, 11) | (Message::Node, 5) => Some(Message::Attribute),
            (Message::Graph, 5) | (Message::Attribute, 5 | 10) | (Message::SparseTensor, 1 | 2) => {
                Some(Message::Tensor)
            }
            (Message::Graph, 15) | (Message::Attribute, 22 | 23) => Some(Message::SparseTensor),
            (Message::Tensor, 13) => Some(Message::Entry),
            _ => None,
        }
    }
}

/// A `BundleError` where the graph names a file for its weights that the manifest does not list, or is damaged.
pub fn check_external_data(graph: &Path, manifest: &Manifest) -> Result<()> {
    let say = |what: String| Error::Bundle(format!("{}: {what}; copy or export the bundle again", graph.display()));
    let model = fs::read(graph).map_err(|error| say(format!("cannot be read ({error})")))?;
    let mut locations = Vec::new();
    walk(&model, Message::Model, DEEPEST, &mut locations).ok_or_else(|| say("is damaged, so no ONNX graph".into()))?;
    match locations.into_iter().find(|name| !manifest.files.contains_key(&FileName(name.clone()))) {
        Some(name) => Err(say(format!("reads weights from {name:?}, which {MANIFEST} does not list in files"))),
        None => Ok(()),
    }
}

/// Collects every location in a message, None where it is damaged. Most messages have none, and are passed over by one
/// search for the key's text.
fn walk(message: &[u8], kind: Message, depth: usize, locations: &mut Vec<String>) -> Option<()> {
    if !message.windows(LOCATION.len()).any(|window| window == LOCATION) {
        return Some(());
    }
    let (mut rest, depth) = (message, depth.checked_sub(1)?);
    while !rest.is_empty() {
        let (number, content) = field(&mut rest)?;
        match (kind.inner(number), content) {
            (Some(Message::Entry), Some(content)) => locations.extend(location(content)?),
            (Some(inner), Some(content)) => walk(content, inner, depth, locations)?,
            _ => {}
        }
    }
    Some(())
}

/// The value of a StringStringEntryProto whose key is "location": 1 is the key, 2 the value, the last of each counts.
fn location(mut entry: &[u8]) -> Option<Option<String>> {
    let (mut key, mut value): (&[u8], &[u8]) = (b"", b"");
    while !entry.is_empty() {
        match field(&mut entry)? {
            (1, Some(content)) => key = content,
            (2, Some(content)) => value = content,
            _ => {}
        }
    }
    if key == LOCATION { Some(Some(String::from_utf8(value.to_vec()).ok()?)) } else { Some(None) }
}

/// Takes a field off the front: its number, and its content where that is a message or a text.
fn field<'a>(message: &mut &'a [u8]) -> Option<(u64, Option<&'a [u8]>)> {
    let key = u32::try_from(varint(message)?).ok()?; // a longer one is another field to some parsers
    let size = match key & 7 {
        0 => {
            varint(message)?;
            0
        }
        1 => 8,
        2 => usize::try_from(varint(message)?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (content, rest) = message.split_at_checked(size)?;
    *message = rest;
    Some((u64::from(key >> 3), (key & 7 == 2).then_some(content)))
}

/// Takes a number off the front: seven bits a byte, the lowest first.
fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (&byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7F).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
