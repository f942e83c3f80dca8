//! `Attention`: what `com.microsoft.GroupQueryAttention` computes in float32, with the same inputs and outputs, and
//! more: several new tokens over a past for any number of rows, each with its own positions. Keys and values lie in the
//! cache as float32, as float16, or as int8 with a scale for each channel.
//!
//! Dimensions: B rows, S new tokens, H heads, K heads of keys and values, D the size of a head, P and T the lengths of
//! the past and present buffers. A row's keys are those before it that the window holds; no others are read.

use std::ffi::CStr;
use std::marker::PhantomData;
use std::ops::Range;

use phimoe_kernels::{Cached, Half, Head, Kernels, check_size};

use crate::ensure;
use crate::ort::{Context, Element, Error, Info, Operator, Place, Port, Result, Tensor};
use crate::schedule::share;

const QUERY: usize = 0;
const KEY: usize = 1;
const VALUE: usize = 2;
const PAST_KEY: usize = 3;
const PAST_VALUE: usize = 4;
const SEQLENS_K: usize = 5;
const TOTAL: usize = 6;
const COS: usize = 7;
const SIN: usize = 8;
const POSITION_IDS: usize = 9;
const ATTENTION_BIAS: usize = 10;
const HEAD_SINK: usize = 11;
const K_SCALE: usize = 12;
const V_SCALE: usize = 13;
const OUTPUT: usize = 0;
const PRESENT_KEY: usize = 1;
const PRESENT_VALUE: usize = 2;

/// Tokens whose keys and values one task writes.
const TOKENS: usize = 8;
/// Scores of a task, at most: what a core's second cache holds beside keys and values.
const SCORES: usize = 64 << 10;

/// What the cache holds, and how.
pub trait Store: Element + Cached {
    const ZERO: Self;
    /// Whether `K_SCALE` and `V_SCALE` are given.
    const SCALED: bool;

    /// `x` [D] as it is cached; `scales` are those of the channels.
    fn store(kernels: &Kernels, x: &[f32], scales: &[f32], to: &mut [Self]);
}

impl Store for f32 {
    const ZERO: Self = 0.0;
    const SCALED: bool = false;

    fn store(_: &Kernels, x: &[f32], _: &[f32], to: &mut [Self]) {
        to.copy_from_slice(x);
    }
}

impl Store for Half {
    const ZERO: Self = Self(0);
    const SCALED: bool = false;

    fn store(kernels: &Kernels, x: &[f32], _: &[f32], to: &mut [Self]) {
        kernels.to_half(x, to);
    }
}

impl Store for i8 {
    const ZERO: Self = 0;
    const SCALED: bool = true;

    fn store(_: &Kernels, x: &[f32], scales: &[f32], to: &mut [Self]) {
        for ((x, scale), to) in x.iter().zip(scales).zip(to) {
            *to = (x / scale).round_ties_even() as i8; // which saturates
        }
    }
}

pub struct Attention<E> {
    kernels: &'static Kernels,
    heads: usize,
    kv_heads: usize,
    rotary: bool,
    /// How many keys a query sees, itself among them.
    window: usize,
    scale: Option<f32>,
    cached: PhantomData<fn(E)>,
}

/// One run's sizes, and where each row of the batch stands.
struct Pass<'a> {
    batch: usize,
    tokens: usize,
    size: usize,
    /// T.
    length: usize,
    /// [B, S, (H + 2 K) * D]: queries, keys, values.
    qkv: &'a [f32],
    /// [B]: the tokens before the new ones.
    past: Vec<usize>,
    rope: Option<Rope<'a>>,
    /// [K, D] of the keys and of the values, or nothing.
    scales: [&'a [f32]; 2],
}

struct Rope<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    /// [B, S]: rows of the tables.
    positions: Vec<usize>,
}

impl<E: Store> Operator for Attention<E> {
    const NAME: &'static CStr = c"Attention";
    const INPUTS: &'static [Port] = &[
        Port::new::<f32>("query"),
        Port::optional::<f32>("key"),
        Port::optional::<f32>("value"),
        Port::optional::<E>("past_key"),
        Port::optional::<E>("past_value"),
        Port::new::<i32>("seqlens_k"),
        Port::new::<i32>("total_sequence_length"),
        Port::optional::<f32>("cos_cache"),
        Port::optional::<f32>("sin_cache"),
        Port::optional::<i64>("position_ids"),
        Port::optional::<f32>("attention_bias"),
        Port::optional::<f32>("head_sink"),
        Port::optional::<f32>("k_scale"),
        Port::optional::<f32>("v_scale"),
    ];
    const OUTPUTS: &'static [Port] =
        &[Port::new::<f32>("output"), Port::new::<E>("present_key"), Port::new::<E>("present_value")];

    fn new(info: &Info) -> Result<Self> {
        let (heads, kv_heads) = (info.size(c"num_heads")?, info.size(c"kv_num_heads")?);
        ensure!(
            heads.is_multiple_of(kv_heads),
            "num_heads is {heads}, expected a multiple of kv_num_heads, which is {kv_heads}"
        );
        for name in [c"rotary_interleaved", c"smooth_softmax"] {
            let value = info.integer(name).unwrap_or(0);
            ensure!(value == 0, "{} is {value}, expected 0", name.to_string_lossy());
        }
        let window = info.integer(c"local_window_size").unwrap_or(-1);
        ensure!(window == -1 || window >= 1, "local_window_size is {window}, expected -1, or 1 or more");
        let scale = info.float(c"scale").ok().filter(|scale| *scale != 0.0);
        Ok(Self {
            kernels: Kernels::detect()?,
            heads,
            kv_heads,
            rotary: info.integer(c"do_rotary").unwrap_or(0) != 0,
            window: usize::try_from(window).unwrap_or(usize::MAX),
            scale,
            cached: PhantomData,
        })
    }

    fn run(&self, context: &Context) -> Result<()> {
        for index in [KEY, VALUE] {
            let given = context.optional_input::<f32>(index)?.is_some();
            ensure!(!given, "{} is given, expected queries, keys and values in query", Self::INPUTS[index].name);
        }
        for index in [ATTENTION_BIAS, HEAD_SINK] {
            let given = context.optional_input::<f32>(index)?.is_some();
            ensure!(!given, "{} is given, expected none", Self::INPUTS[index].name);
        }
        let pasts = [context.place::<E>(PAST_KEY)?, context.place::<E>(PAST_VALUE)?];
        let pass = self.pass(context, &pasts)?;
        let output = context.output::<f32>(OUTPUT, &[pass.batch, pass.tokens, self.heads * pass.size])?;
        let shape = [pass.batch, self.kv_heads, pass.length, pass.size];
        let presents = [context.output_place(PRESENT_KEY, &shape)?, context.output_place(PRESENT_VALUE, &shape)?];
        for (past, present) in pasts.iter().zip(&presents) {
            self.keep(context, &pass, past.as_ref(), present)?;
        }
        self.write(context, &pass, &presents)?;
        self.attend(context, &pass, &presents, output)
    }
}

impl<E: Store> Attention<E> {
    /// The inputs, checked.
    fn pass<'a>(&self, context: &'a Context, pasts: &[Option<Place<E>>; 2]) -> Result<Pass<'a>> {
        let Tensor { shape, data: qkv } = context.input::<f32>(QUERY)?;
        let packed = self.heads + 2 * self.kv_heads;
        ensure!(
            shape.len() == 3 && shape[2] > 0 && shape[2].is_multiple_of(packed),
            "query is {shape:?}, expected [batch, tokens, {packed} * the size of a head]"
        );
        let (batch, tokens, size) = (shape[0], shape[1], shape[2] / packed);
        check_size(size)?;
        let room = self.past_length(pasts, batch, size)?;
        let total = context.input::<i32>(TOTAL)?;
        let [total] = total.data else {
            return Err(Error(format!("total_sequence_length is {:?}, expected one number", total.shape)));
        };
        let longest = usize::try_from(*total).ok().filter(|longest| *longest >= tokens);
        let longest = longest.ok_or_else(|| {
            Error(format!("total_sequence_length is {total}, expected {tokens} or more, as many as the new tokens"))
        })?;
        let lengths = context.input::<i32>(SEQLENS_K)?;
        ensure!(lengths.data.len() == batch, "seqlens_k is {:?}, expected [{batch}]", lengths.shape);
        // a first prompt is padded on the right: a row may be shorter than its tokens
        let least = if longest == tokens { 0 } else { tokens };
        let past = lengths.data.iter().map(|last| {
            let length = usize::try_from(i64::from(*last) + 1).ok().filter(|length| (least..=longest).contains(length));
            let past = length.map(|length| if longest == tokens { 0 } else { length - tokens });
            past.filter(|past| *past <= room).ok_or_else(|| {
                Error(format!(
                    "seqlens_k holds {last}, expected at least {} and below {longest}, with {tokens} new tokens and \
                     room for {room} before them",
                    least as i64 - 1
                ))
            })
        });
        let past = past.collect::<Result<Vec<_>>>()?;
        let rope = if self.rotary { Some(rope(context, batch, tokens, size, &past)?) } else { None };
        let scales = [self.scales(context, K_SCALE, size)?, self.scales(context, V_SCALE, size)?];
        Ok(Pass { batch, tokens, size, length: room.max(longest), qkv, past, rope, scales })
    }

    /// Those of the channels, [K, D]; nothing where the cache has none.
    fn scales<'a>(&self, context: &'a Context, index: usize, size: usize) -> Result<&'a [f32]> {
        let name = Self::INPUTS[index].name;
        match context.optional_input::<f32>(index)? {
            Some(given) if E::SCALED => {
                let expected = [1, self.kv_heads, 1, size];
                ensure!(given.shape == expected, "{name} is {:?}, expected {expected:?}", given.shape);
                Ok(given.data)
            }
            None if !E::SCALED => Ok(&[]),
            found => Err(Error(format!(
                "{name} is {}, expected for int8 keys and values, and for no others",
                if found.is_some() { "given" } else { "missing" }
            ))),
        }
    }

    /// P.
    fn past_length(&self, pasts: &[Option<Place<E>>; 2], batch: usize, size: usize) -> Result<usize> {
        match pasts {
            [None, None] => Ok(0),
            [Some(key), Some(value)] => {
                let fits = |shape: &[usize]| {
                    shape.len() == 4 && [shape[0], shape[1], shape[3]] == [batch, self.kv_heads, size]
                };
                ensure!(
                    fits(&key.shape) && key.shape == value.shape,
                    "past_key is {:?} and past_value is {:?}, expected both [{batch}, {}, length, {size}]",
                    key.shape,
                    value.shape,
                    self.kv_heads
                );
                Ok(key.shape[2])
            }
            _ => Err(Error("one of past_key and past_value is missing, expected both or none".into())),
        }
    }

    /// Copies the past to the present, unless they share their memory; what is in neither is zero.
    fn keep(&self, context: &Context, pass: &Pass, past: Option<&Place<E>>, present: &Place<E>) -> Result<()> {
        if let Some(past) = past
            && past.is(present)?
        {
            return Ok(());
        }
        let stretch = pass.length * pass.size;
        share(
            context,
            pass.batch * self.kv_heads,
            || (),
            |(), head| {
                // SAFETY: the present is this run's output, and a task has its head alone. The past is another tensor.
                unsafe {
                    let present = present.part_mut(head * stretch..(head + 1) * stretch);
                    let kept = past.map_or(0, |past| past.shape[2] * pass.size);
                    let (kept, rest) = present.split_at_mut(kept);
                    if let Some(past) = past {
                        kept.copy_from_slice(past.part(head * kept.len()..(head + 1) * kept.len()));
                    }
                    rest.fill(E::ZERO);
                }
                Ok(())
            },
        )
    }

    /// Writes the new keys, rotated, and values to the present.
    fn write(&self, context: &Context, pass: &Pass, [keys, values]: &[Place<E>; 2]) -> Result<()> {
        let size = pass.size;
        let rows = pass.batch * pass.tokens;
        share(context, rows.div_ceil(TOKENS), Vec::new, |turned: &mut Vec<f32>, task| {
            turned.resize(size, 0.0);
            for row in task * TOKENS..((task + 1) * TOKENS).min(rows) {
                let (b, token) = (row / pass.tokens, row % pass.tokens);
                for head in 0..self.kv_heads {
                    let at = ((b * self.kv_heads + head) * pass.length + pass.past[b] + token) * size;
                    // SAFETY: a task has the places of its tokens alone, and nobody reads before all are written.
                    let (key, value) = unsafe { (keys.part_mut(at..at + size), values.part_mut(at..at + size)) };
                    let [key_scales, value_scales] = pass.scales(head);
                    self.turn(pass, row, self.heads + head, turned);
                    E::store(self.kernels, turned, key_scales, key);
                    let new = self.head(pass, row, self.heads + self.kv_heads + head);
                    E::store(self.kernels, new, value_scales, value);
                }
            }
            Ok(())
        })
    }

    fn attend(&self, context: &Context, pass: &Pass, [keys, values]: &[Place<E>; 2], output: &mut [f32]) -> Result<()> {
        let (size, group) = (pass.size, self.heads / self.kv_heads);
        let scale = self.scale.unwrap_or(1.0 / (size as f32).sqrt());
        let output = Place::over(output);
        // queries that share keys go together
        let tokens = (SCORES / (group * pass.length.min(self.window.saturating_add(TOKENS))).max(1)).clamp(1, TOKENS);
        let blocks = pass.tokens.div_ceil(tokens);
        let scratch = || (Vec::new(), Vec::new(), Vec::new());
        share(context, pass.batch * self.kv_heads * blocks, scratch, |(queries, scores, out), task| {
            let (stream, block) = (task / blocks, blocks - 1 - task % blocks); // the last see the most
            let (b, head) = (stream / self.kv_heads, stream % self.kv_heads);
            let tokens = block * tokens..((block + 1) * tokens).min(pass.tokens);
            let stretch = stream * pass.length * size..(stream + 1) * pass.length * size;
            // SAFETY: keys and values are written, and only read from here on.
            let (keys, values) = unsafe { (keys.part(stretch.clone()), values.part(stretch)) };
            queries.resize(tokens.len() * group * size, 0.0);
            out.resize(queries.len(), 0.0);
            let order = tokens.flat_map(|token| (0..group).map(move |g| (token, head * group + g)));
            let [key_scales, value_scales] = pass.scales(head);
            for ((token, head), query) in order.clone().zip(queries.chunks_exact_mut(size)) {
                self.turn(pass, b * pass.tokens + token, head, query);
                scale_channels(query, key_scales);
            }
            let spans: Vec<Range<usize>> = order.clone().map(|(token, _)| self.span(pass, b, token)).collect();
            let head = Head::new(size, scale, keys, values)?;
            self.kernels.attend(&head, queries, &spans, scores, out)?;
            for ((token, head), out) in order.zip(out.chunks_exact_mut(size)) {
                scale_channels(out, value_scales);
                let at = ((b * pass.tokens + token) * self.heads + head) * size;
                // SAFETY: a task has its tokens' and heads' places alone.
                unsafe { output.part_mut(at..at + size) }.copy_from_slice(out);
            }
            Ok(())
        })
    }

    /// The keys that a token sees.
    fn span(&self, pass: &Pass, b: usize, token: usize) -> Range<usize> {
        let end = pass.past[b] + token + 1;
        end.saturating_sub(self.window)..end
    }

    /// One head of a token's queries, keys or values [D].
    fn head<'a>(&self, pass: &Pass<'a>, row: usize, head: usize) -> &'a [f32] {
        let packed = self.heads + 2 * self.kv_heads;
        &pass.qkv[(row * packed + head) * pass.size..][..pass.size]
    }

    /// One head of a token's queries or keys, turned by its position.
    fn turn(&self, pass: &Pass, row: usize, head: usize, out: &mut [f32]) {
        let x = self.head(pass, row, head);
        match &pass.rope {
            None => out.copy_from_slice(x),
            Some(rope) => {
                let half = pass.size / 2;
                let [cos, sin] = [rope.cos, rope.sin].map(|table| &table[rope.positions[row] * half..][..half]);
                self.kernels.rotate(x, cos, sin, out);
            }
        }
    }
}

impl Pass<'_> {
    /// The scales of a head's channels, of keys and of values: [D] each, or nothing.
    fn scales(&self, head: usize) -> [&[f32]; 2] {
        self.scales.map(|all| if all.is_empty() { all } else { &all[head * self.size..][..self.size] })
    }
}

/// Multiplies each channel with its scale, where there are any.
fn scale_channels(x: &mut [f32], scales: &[f32]) {
    for (x, scale) in x.iter_mut().zip(scales) {
        *x *= scale;
    }
}

fn rope<'a>(context: &'a Context, batch: usize, tokens: usize, size: usize, past: &[usize]) -> Result<Rope<'a>> {
    let (cos, sin) = (context.input::<f32>(COS)?, context.input::<f32>(SIN)?);
    ensure!(
        cos.shape.len() == 2 && cos.shape[1] == size / 2 && cos.shape == sin.shape,
        "cos_cache is {:?} and sin_cache is {:?}, expected both [positions, {}]",
        cos.shape,
        sin.shape,
        size / 2
    );
    let given = context.optional_input::<i64>(POSITION_IDS)?;
    if let Some(ids) = &given {
        ensure!(ids.shape == [batch, tokens], "position_ids is {:?}, expected [{batch}, {tokens}]", ids.shape);
    }
    let rows = cos.shape[0];
    let positions = (0..batch * tokens).map(|row| {
        let position = match &given {
            Some(ids) => ids.data[row],
            None => (past[row / tokens] + row % tokens) as i64,
        };
        let known = usize::try_from(position).ok().filter(|position| *position < rows);
        known.ok_or_else(|| Error(format!("a token is at position {position}, expected 0 to below {rows}")))
    });
    let positions = positions.collect::<Result<Vec<_>>>()?;
    Ok(Rope { cos: cos.data, sin: sin.data, positions })
}
