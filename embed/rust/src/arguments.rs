//! The words of the command line.

use std::ffi::OsString;

pub const USAGE: &str = "\
usage: phimoe-generate [--chat | --json] [--threads N] [--operators PATH] BUNDLE PROMPT MAX_NEW_TOKENS";
pub const HELP: &str = "\
usage: phimoe-generate [--chat | --json] [--threads N] [--operators PATH] BUNDLE PROMPT MAX_NEW_TOKENS

Continues a prompt with a bundle of phimoe-export, greedily. The text goes to standard output, its token ids go to
standard error, or what is wrong.

  BUNDLE          a folder that phimoe-export wrote
  PROMPT          the text to continue
  MAX_NEW_TOKENS  where to end at the latest
  --chat          PROMPT is a user's message
  --json          PROMPT is a text, token ids or messages in JSON
  --threads N     threads of the processor; by default as many as serve
  --operators PATH
                  the library of the native operators, for bundles that need it; by default it is looked for beside this
                  program
  --help          print this
  --              what follows is no option

  phimoe-generate austen-int4 \"It was a fine morning\" 60

ORT_DYLIB_PATH in the environment names ONNX Runtime's library. ORT_DISABLE_TELEMETRY=0 turns its telemetry on; it is
off otherwise.
";

const OPTIONS: [&str; 5] = ["--chat", "--json", "--threads", "--operators", "--help"];

/// What PROMPT is.
pub enum Form {
    Text,
    Chat,
    Json,
}

pub struct Arguments {
    pub form: Form,
    pub threads: Option<String>,
    pub operators: Option<OsString>,
    pub bundle: OsString,
    pub prompt: String,
    pub max_new_tokens: String,
}

/// The words; None where help is asked for. An error says which word is wrong.
pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Option<Arguments>, String> {
    let (mut form, mut threads, mut operators) = (Form::Text, None, None);
    let (mut rest, mut options) = (Vec::new(), true);
    let mut words = words;
    while let Some(word) = words.next() {
        match word.to_str().filter(|word| options && word.starts_with("--")) {
            None => rest.push(word),
            Some("--") => options = false,
            Some("--help") => return Ok(None),
            Some("--chat") => form = Form::Chat,
            Some("--json") => form = Form::Json,
            Some("--threads") => threads = Some(text(words.next().ok_or("--threads has no value")?, "--threads")?),
            Some("--operators") => operators = Some(words.next().ok_or("--operators has no value")?),
            Some(unknown) => return Err(format!("{unknown} is no option; known ones are {}", OPTIONS.join(", "))),
        }
    }
    let count = rest.len();
    let [bundle, prompt, max_new_tokens] =
        rest.try_into().map_err(|_| format!("{count} arguments, expected BUNDLE, PROMPT and MAX_NEW_TOKENS"))?;
    let (prompt, max_new_tokens) = (text(prompt, "PROMPT")?, text(max_new_tokens, "MAX_NEW_TOKENS")?);
    Ok(Some(Arguments { form, threads, operators, bundle, prompt, max_new_tokens }))
}

fn text(word: OsString, name: &str) -> Result<String, String> {
    word.into_string().map_err(|word| format!("{name} is {word:?}, which is no Unicode; expected UTF-8"))
}
