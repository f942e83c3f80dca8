//! The three kinds of errors of spec/embedding.md.

use std::fmt;

/// Says with its kind which file or option it is about, what was found, what was expected and what to do.
#[derive(Debug)]
pub enum Error {
    Bundle(String),
    Device(String),
    Generation(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, message) = match self {
            Error::Bundle(message) => ("BundleError", message),
            Error::Device(message) => ("DeviceError", message),
            Error::Generation(message) => ("GenerationError", message),
        };
        write!(formatter, "{kind}: {}", message.trim().replace('\n', " "))
    }
}

/// ONNX Runtime's own refusals, such as too little memory.
impl<T> From<ort::Error<T>> for Error {
    fn from(error: ort::Error<T>) -> Self {
        Error::Device(error.to_string())
    }
}
