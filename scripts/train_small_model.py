"""Trains a small PhiMoE, one of models/, saves it like Microsoft's checkpoints, and measures what was saved.

Train, 40 minutes on two cores:  python scripts/train_small_model.py CORPUS models/phimoe-austen
The one of widths of 256:        python scripts/train_small_model.py CORPUS models/phimoe-austen-256
Measure only:                    python scripts/train_small_model.py CORPUS models/phimoe-austen --evaluate

The folder's name says which of the two shapes it is.

The forward pass is phimoe_onnx.modeling's. Its router hardly ever passes a gradient on (with a jitter of 0.01 most
tokens keep one expert a round, whose weight is then 1), so the backward pass is that of the full softmax at the two
chosen experts, and the load-balancing loss of Switch (arXiv 2101.03961) keeps all experts in use.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from corpus import (
    BOS,
    CHAT_TOKENS,
    EOS,
    chat_samples,
    document_text,
    held_out_text,
    read_corpus,
    special_token,
    train_tokenizer,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from phimoe_onnx import modeling
from phimoe_onnx.config import PhiMoEConfig, read_config

# sequences x tokens a step and process, in turn: short rope factors, long rope factors
BATCHES = (
    (10, 256),
    (2, 1024),
)
CHAT_SHARE = 0.12
DROPOUT = 0.1
PEAK_LR, FINAL_LR, WARM_UP_STEPS = 3e-3, 0.03, 150
BALANCE_LOSS = 0.01
SAVE_EVERY = 1000
TRANSFORMERS_VERSION = "4.57.6"
SHAPES = {
    "phimoe-austen": {
        "hidden_size": 192,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "vocab_size": 2048,
    },
    "phimoe-austen-256": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "vocab_size": 1024,
    },
}


def configuration(shape: dict[str, int]) -> dict[str, Any]:
    """The config.json of a shape."""
    pairs = shape["hidden_size"] // shape["num_attention_heads"] // 2
    mscale = math.sqrt(1 + math.log(4) / math.log(256))
    return {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": shape["vocab_size"] - len(CHAT_TOKENS),
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "input_jitter_noise": 0.01,
        "lm_head_bias": True,
        "max_position_embeddings": 1024,
        "model_type": "phimoe",
        "num_experts_per_tok": 2,
        "original_max_position_embeddings": 256,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [round(4 ** (i / (pairs - 1)), 4) for i in range(pairs)],
            "long_mscale": mscale,
            "original_max_position_embeddings": 256,
            "short_factor": [round(1 + 0.05 * i / (pairs - 1), 4) for i in range(pairs)],
            "short_mscale": mscale,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": BALANCE_LOSS,
        "router_jitter_noise": 0.01,
        "sliding_window": 1024,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        **shape,
    }


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


class TrainableMoE(modeling.SparseMoE):
    """The same outputs, with a gradient for the router, the load-balancing loss beside it and one matmul an expert."""

    balance_loss: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> the same shape; leaves the balancing loss in `balance_loss`."""
        tokens = x.flatten(0, 1)
        scores = self.gate(tokens)
        probabilities = scores.softmax(dim=-1)
        with torch.no_grad():
            exact, chosen = modeling.sparse_mixer(scores, self.jitter)
            count = chosen.flatten().bincount(minlength=scores.shape[1])
        weights = probabilities.gather(1, chosen)
        weights = weights + (exact - weights).detach()
        self.balance_loss = len(count) * (count / count.sum() * probabilities.mean(dim=0)).sum()

        order = chosen.flatten().argsort(stable=True)
        gate_up, down = self.experts.gate_up_proj.unbind(), self.experts.down_proj.unbind()
        outputs = []
        for expert, part in enumerate(tokens[order // 2].split(count.tolist())):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down[expert]))
        output = torch.cat(outputs)[order.argsort()].view(*chosen.shape, -1)
        return F.dropout((output * weights[:, :, None]).sum(dim=1).view_as(x), DROPOUT, self.training)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`modeling.attention` for whole sequences without a cache or padding: the fused causal kernel needs no mask."""
    query, key, value = (x.unflatten(-1, (-1, past_key.shape[-1])).transpose(1, 2) for x in (query, key, value))
    query, key = (modeling.rotate(x, cos, sin) for x in (query, key))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).flatten(2), past_key, past_value


def trainable_model(config: PhiMoEConfig, seed: int) -> modeling.PhiMoEForCausalLM:
    """A freshly initialised model; puts TrainableMoE into `modeling` for the whole process."""
    modeling.SparseMoE = TrainableMoE  # type: ignore[misc]
    model = modeling.PhiMoEForCausalLM(config, modeling.Seams(attention=causal_attention))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def logits(model: modeling.PhiMoEForCausalLM, ids: Tensor) -> Tensor:
    """Of whole sequences [B, S], without a cache."""
    return model(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.int64), model.empty_cache(len(ids)))[0]


def next_token_loss(model: modeling.PhiMoEForCausalLM, ids: Tensor) -> Tensor:
    """Mean over the targets of ids [B, S + 1], in nats."""
    scores = logits(model, ids[:, :-1])  # F.cross_entropy's backward pass is several times slower on the CPU
    return (scores.logsumexp(dim=-1) - scores.gather(-1, ids[:, 1:, None])[..., 0]).mean()


def draw_batch(text: Tensor, chat: Tensor, chat_starts: Tensor, sequences: int, length: int) -> Tensor:
    """[sequences, length + 1]: pieces of the books from anywhere, and some chats from where one begins."""
    rows = []
    for _ in range(sequences):
        if torch.rand(()) < CHAT_SHARE:
            start = int(chat_starts[torch.randint(len(chat_starts), ())].clamp(max=len(chat) - length - 1))
            rows.append(chat[start : start + length + 1])
        else:
            start = int(torch.randint(len(text) - length, ()))
            rows.append(text[start : start + length + 1])
    return torch.stack(rows)


def train(
    rank: int, processes: int, minutes: float, seed: int, data: tuple[Tensor, Tensor, Tensor], folder: Path
) -> None:
    """One of `processes` workers; their gradients are averaged. The learning rate follows the clock, so the run ends
    annealed.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    model = trainable_model(read_config(folder), seed)
    parameters = list(model.parameters())
    gradient = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, view in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = view.view_as(parameter)
    decayed = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(decayed, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(seed + 1 + rank)

    start, step, tokens, average = time.monotonic(), 0, 0, torch.zeros(3)
    while True:
        progress = torch.tensor((time.monotonic() - start) / (60 * minutes))
        dist.broadcast(progress, src=0)
        if progress >= 1:
            break
        cosine = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * float(progress)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine
        kind = (step + rank) % 2
        batch = draw_batch(*data, *BATCHES[kind])
        gradient.zero_()
        loss = next_token_loss(model, batch)
        balance = torch.stack([layer.block_sparse_moe.balance_loss for layer in model.model.layers]).mean()
        (loss + BALANCE_LOSS * balance).backward()
        dist.all_reduce(gradient)
        gradient /= processes
        gradient *= (1.0 / (gradient.norm() + 1e-6)).clamp(max=1.0)
        optimizer.step()

        tokens += processes * batch[:, 1:].numel()
        average[kind], average[2] = loss.detach(), balance.detach()
        step += 1
        if rank == 0 and step % 50 == 0:
            seconds = time.monotonic() - start
            print(
                f"step {step}  loss {average[0]:.3f} at {BATCHES[0][1]}, {average[1]:.3f} at {BATCHES[1][1]}  "
                f"balance {average[2]:.3f}  "
                f"{tokens / 1e6:.2f} M tokens, {tokens / seconds:.0f}/s  {minutes - seconds / 60:.1f} minutes left",
                flush=True,
            )
        if rank == 0 and step % SAVE_EVERY == 0:
            save_weights(model, folder)
    if rank == 0:
        save_weights(model, folder)
    dist.destroy_process_group()


def save_weights(model: modeling.PhiMoEForCausalLM, folder: Path) -> None:
    """bf16 safetensors in two shards and their index, under the names of Microsoft's checkpoints."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        weight = parameter.detach().to(torch.bfloat16)
        prefix = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for expert, (w1, w3) in enumerate(part.chunk(2) for part in weight):
                tensors |= {f"{prefix}.{expert}.w1.weight": w1.clone(), f"{prefix}.{expert}.w3.weight": w3.clone()}
        elif name.endswith("down_proj"):
            tensors |= {f"{prefix}.{expert}.w2.weight": w2.clone() for expert, w2 in enumerate(weight)}
        else:
            tensors[name] = weight
    total, seen = sum(t.nbytes for t in tensors.values()), 0
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in tensors.items():
        shards[int(seen >= total / 2)][name] = tensor
        seen += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def load_model(folder: Path, seams: modeling.Seams) -> modeling.PhiMoEForCausalLM:
    """The saved checkpoint in `modeling`'s own model, in fp32."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(shard).items()}
    config = read_config(folder)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{w}.weight") for e in range(config.num_local_experts)])
            for w in ("w1", "w2", "w3")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat((w1, w3), dim=1), f"{prefix}.down_proj": w2}
    model = modeling.PhiMoEForCausalLM(config, seams)
    model.load_state_dict(tensors)
    return model.eval()


def write_json(path: Path, value: object) -> None:
    """Indented, in UTF-8, as transformers writes its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_configuration(config: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Everything of the checkpoint but the weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    eos, end = tokenizer.token_to_id(EOS), tokenizer.token_to_id("<|end|>")
    assert eos == config["eos_token_id"]
    write_json(folder / "config.json", dict(sorted(config.items())))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [end, eos], "pad_token_id": eos}
    write_json(folder / "generation_config.json", generation | {"transformers_version": TRANSFORMERS_VERSION})
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = {
        str(tokenizer.token_to_id(token)): {flag: getattr(special_token(token), flag) for flag in flags}
        for token in ("<unk>", BOS, "</s>", *CHAT_TOKENS)
    }
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special)
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        **special,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


@torch.no_grad()
def generate(
    model: modeling.PhiMoEForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int, pick: Callable[[Tensor], Tensor]
) -> str:
    """`prompt` continued up to <|end|>, <|endoftext|> or `tokens` more; recomputes the whole text for every token."""
    ids = tokenizer.encode(prompt).ids
    stop = {tokenizer.token_to_id(EOS), tokenizer.token_to_id("<|end|>")}
    for _ in range(tokens):
        ids.append(int(pick(logits(model, torch.tensor([ids]))[0, -1])))
        if ids[-1] in stop:
            break
    return tokenizer.decode(ids, skip_special_tokens=False)


@torch.no_grad()
def evaluate(corpus: Path, folder: Path) -> None:
    """Prints what the model card reports of the saved checkpoint."""
    choices: list[Tensor] = []

    def recorded(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
        weights, chosen = modeling.sparse_mixer(scores, jitter)
        choices.append(chosen)
        return weights, chosen

    model = load_model(folder, modeling.Seams(sparse_mixer=recorded))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = held_out_text(corpus)
    ids = torch.tensor(tokenizer.encode(text).ids)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"held-out text: {len(text.encode()):,} bytes, {len(ids):,} tokens")
    for length in (length for _, length in BATCHES):
        windows = ids[: len(ids) // length * length].view(-1, length)
        loss = torch.stack([next_token_loss(model, window[None]) for window in windows]).mean()
        bits = float(loss) / math.log(2) * len(ids) / len(text.encode())
        print(
            f"windows of {length} tokens: {len(windows)}, perplexity {loss.exp():.2f} a token, {bits:.3f} bits a byte"
        )
    layers = model.config.num_hidden_layers
    for layer in range(layers):
        share = torch.cat([chosen.flatten() for chosen in choices[layer::layers]]).bincount(
            minlength=model.config.num_local_experts
        )
        print(f"layer {layer}, % of choices by expert: " + " ".join(f"{100 * s:.1f}" for s in share / share.sum()))

    def sample(scores: Tensor) -> Tensor:
        return torch.multinomial((scores / 0.8).softmax(dim=-1), 1)

    torch.manual_seed(0)
    for title, pick in (("greedy", torch.argmax), ("sampled at temperature 0.8", sample)):
        print(f"\n--- {title}\n{generate(model, tokenizer, 'Anne could not help thinking', 80, pick)}")
    chat = "<|user|>\nTell me about Elizabeth.<|end|>\n<|assistant|>\n"
    print(f"\n--- chat, sampled at temperature 0.8\n{generate(model, tokenizer, chat, 120, sample)}")


def main() -> None:
    """Reads the command line; trains unless told to measure only, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with the texts")
    parser.add_argument("folder", type=Path, help="folder of the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint that is there, train nothing")
    parser.add_argument("--minutes", type=float, default=40, help="length of the training run (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="one a core (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.evaluate:
        shape = SHAPES.get(arguments.folder.resolve().name)
        if shape is None:
            parser.error(f"FOLDER is {arguments.folder}; expected its name to be one of {', '.join(SHAPES)}")
        books = read_corpus(arguments.corpus)
        texts = [document_text(name, document) for name, book in books.items() for document in book]
        tokenizer = train_tokenizer(texts, shape["vocab_size"])
        arguments.folder.mkdir(parents=True, exist_ok=True)
        save_configuration(configuration(shape), tokenizer, arguments.folder)
        text, chat = (
            [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(samples)]
            for samples in ([text + EOS for text in texts], chat_samples(books, 8000))
        )
        starts = torch.tensor([0] + [len(ids) for ids in chat[:-1]]).cumsum(dim=0)
        data = (torch.cat(text), torch.cat(chat), starts)
        print(f"{len(data[0]):,} tokens of text, {len(data[1]):,} of chat", flush=True)
        mp.spawn(
            train,
            (arguments.processes, arguments.minutes, arguments.seed, data, arguments.folder),
            nprocs=arguments.processes,
        )
    evaluate(arguments.corpus, arguments.folder)


if __name__ == "__main__":
    main()
