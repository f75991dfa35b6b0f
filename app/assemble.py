"""Makes an untrained FastLongSpeech of the encoder of any Whisper and any causal language model of transformers.

    fastlongspeech assemble --encoder openai/whisper-base --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --output model

Encoder and language model keep their weights; the projector between them is random, and there is no CTC decoder yet:
`fastlongspeech.train.ctc` and then `fastlongspeech.train.align` teach both. The folder is loaded again and checked
before it gets its name.
"""

import argparse
import gc
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .. import FastLongSpeechConfig, FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor
from ..windows_fastlongspeech import WINDOWS
from .whisper import read_whisper

AUDIO_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
QUESTION = "Anna lives in Paris with her cat Tom. Where does Anna live?"
CHECKED_TOKENS = 16
# Put before a language model's own template, which knows text alone: a list of parts becomes one text.
PARTS_TO_TEXT = (
    "{% set chat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is defined and message['content'] is not string and message['content'] is iterable %}"
    "{% set said = namespace(text='') %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
    "{% set said.text = said.text + '<|audio_bos|><|AUDIO|><|audio_eos|>\n' %}"
    "{% elif 'text' in part %}"
    "{% set said.text = said.text + part['text'] %}"
    "{% endif %}"
    "{% endfor %}"
    "{% set message = dict(message, content=said.text) %}"
    "{% set chat.messages = chat.messages + [message] %}"
    "{% else %}"
    "{% set chat.messages = chat.messages + [message] %}"
    "{% endif %}"
    "{% endfor %}"
    "{% set messages = chat.messages %}"
)
# For language models without a template, which have learnt no form of chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def assemble(encoder: str, language_model: str, output: Path, dtype: str = "auto") -> None:
    """Writes the folder of an untrained model, checked: frames are Whisper's, answers to text the language model's.

    Args:
        encoder: see `read_whisper`.
        language_model: a folder or Hub id of transformers, or the path of a GGUF file.
        output: a folder that does not exist yet, or is empty.
        dtype: type of the saved weights; `"auto"`: as the language model is saved, a GGUF file in float32.

    Raises:
        OSError: a part can't be found.
        ValueError: the parts can't be joined, `output` is in use, or the model that was written does not answer alike.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists already; choose another folder, or delete it.")
    whisper, extractor = read_whisper(encoder)
    text_model, tokenizer = read_language_model(language_model, dtype)
    whisper.to(text_model.dtype)  # type: ignore[arg-type]  # a decorator hides the overloads
    check_encoder(whisper)
    ids = chat_ids(tokenizer, QUESTION)
    mel = torch.randn(1, whisper.config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    frames, answer = whisper_frames(whisper, mel), answer_text(text_model, ids)
    model, processor = join_parts(whisper, extractor, text_model, tokenizer)

    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    del whisper, text_model, model
    gc.collect()
    check(unfinished, mel, frames, ids, answer)
    if output.exists():
        output.rmdir()
    unfinished.rename(output)


def join_parts(
    whisper: WhisperEncoder, extractor: Any, text_model: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[FastLongSpeechForConditionalGeneration, FastLongSpeechProcessor]:
    """Returns the untrained model of both parts and its processor; it takes the parts over and changes them.

    The projector is random. There is no CTC decoder, which a folder may lack: `ctc_trained` is false then.
    """
    template = PARTS_TO_TEXT + (cast(str | None, tokenizer.chat_template) or PLAIN_TEMPLATE)
    if begins(tokenizer, chat(tokenizer, {"role": "user", "content": QUESTION})):
        tokenizer.backend_tokenizer.post_processor = None
    if tokenizer.pad_token is None:  # of a batch; Llama has none
        tokenizer.pad_token = tokenizer.eos_token
    add_audio_tokens(text_model, tokenizer)
    processor = FastLongSpeechProcessor(
        extractor, tokenizer, chat_template=template, end_of_turn_token=end_of_turn(tokenizer)
    )
    return join(whisper, text_model, processor), processor


def read_language_model(source: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a causal language model of transformers and its tokenizer, from a folder, a Hub id or a GGUF file.

    Raises:
        OSError: there is no model.
        ValueError: its head has a bias, which ours has no place for, it is quantised in another form, or a package
            that reads GGUF files is missing.
    """
    options: dict[str, Any] = {}
    if source.endswith(".gguf"):
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{source} needs {package}, which is missing; install it with: pip install 'fastlongspeech[gguf]'."
                )
        if not Path(source).is_file():
            raise FileNotFoundError(f"language-model {source} does not exist; check the path.")
        options["gguf_file"] = Path(source).name
        dtype = "float32" if dtype == "auto" else dtype
        source = str(Path(source).parent)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval()
    if "gguf_file" in options:
        # The weights are plain by now; a configuration that says otherwise keeps a Trainer from them.
        model.config.__dict__.pop("quantization_config", None)
    elif getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"language-model {source} is quantised; pass it as it was before, or a GGUF file.")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"language-model {source} has a head that is not one matrix; choose another.")
    return model, AutoTokenizer.from_pretrained(source, **options)


def check_encoder(whisper: Any) -> None:
    """Refuses an encoder of other windows than 30 s."""
    positions, needed = whisper.config.max_source_positions, int(WINDOWS.convolved(torch.tensor(3000)))
    if positions != needed:
        raise ValueError(f"the encoder has {positions} positions; pass a Whisper with {needed}, those of 30 s.")


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    """Returns the ids `(1, S)` of a question as a chat, in the tokenizer's own template where it has one."""
    prompt = chat(tokenizer, {"role": "user", "content": question}, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=not begins(tokenizer, prompt), return_tensors="pt")["input_ids"]


def chat(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, str], **options: Any) -> str:
    """Returns a chat as the tokenizer's template writes it, or the plain one."""
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    return cast(str, tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options))


def begins(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Tells whether a template has written the token that begins a text: the tokenizer must not write it again."""
    return bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the special token that the chat template writes after an answer: it ends what the model says."""
    written = chat(tokenizer, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ANSWER"})
    after = written.rpartition("ANSWER")[2]
    special = [token for token in tokenizer.all_special_tokens if token in after]
    return min(special, key=after.index, default=str(tokenizer.eos_token))


def add_audio_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the tokens around audio where they are missing, each with the mean of all embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    known = min(len(tokenizer), rows)  # a tokenizer may know a token more than the language model
    tokenizer.add_special_tokens({"extra_special_tokens": AUDIO_TOKENS}, replace_extra_special_tokens=False)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.weight.data
        weight[known : len(tokenizer)] = weight[:known].mean(0, dtype=torch.float32).to(weight.dtype)


def join(
    whisper: WhisperEncoder, text_model: Any, processor: FastLongSpeechProcessor
) -> FastLongSpeechForConditionalGeneration:
    """Returns the model of both parts, which it takes over; see `join_parts`."""
    theirs = whisper.config
    audio_config = Qwen2AudioEncoderConfig(
        num_mel_bins=theirs.num_mel_bins,
        d_model=theirs.d_model,
        encoder_layers=theirs.encoder_layers,
        encoder_attention_heads=theirs.encoder_attention_heads,
        encoder_ffn_dim=theirs.encoder_ffn_dim,
        activation_function=theirs.activation_function,
    )
    config = FastLongSpeechConfig(
        audio_config=audio_config.to_dict(),
        text_config={name: value for name, value in text_model.config.to_dict().items() if name[0] != "_"},
        audio_token_index=processor.audio_token_id,
        ctc_trained=False,
        dtype=text_model.dtype,
    )
    with torch.device("meta"):  # the weights are there already
        model = FastLongSpeechForConditionalGeneration(config)
    projector = nn.Linear(theirs.d_model, config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(projector.weight, std=theirs.d_model**-0.5, generator=generator)
    nn.init.zeros_(projector.bias)
    parts = {
        "model.audio_tower": whisper,
        "model.language_model": text_model.base_model,
        "model.multi_modal_projector.linear": projector.to(text_model.dtype),
        "lm_head": text_model.get_output_embeddings(),
    }
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    found = model.load_state_dict(state, strict=False, assign=True)
    left = [name for name in found.missing_keys if "ctc_decoder" not in name]
    if left or found.unexpected_keys:
        raise ValueError(f"the parts do not fit: {left + found.unexpected_keys}; is the language model an adapter?")
    model.tie_weights()
    model.generation_config = text_model.generation_config
    model.model.ctc_decoder = None  # a folder without one loads, with ctc_trained false
    return model


@torch.no_grad()
def whisper_frames(whisper: WhisperEncoder, mel: Tensor) -> Tensor:
    """Returns what Whisper's last LayerNorm reads, `(1, 1500, D)`."""
    heard = []
    hook = whisper.layer_norm.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    whisper(mel.to(whisper.dtype))
    hook.remove()
    return heard[0]


def answer_text(model: Any, ids: Tensor) -> Tensor:
    """Returns the greedy answer to a prompt of text, ids `(1, S)`."""
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=CHECKED_TOKENS)


@torch.no_grad()
def check(folder: Path, mel: Tensor, frames: Tensor, ids: Tensor, answer: Tensor) -> None:
    """Loads a model again and compares it with its parts.

    Raises:
        ValueError: it hears or answers otherwise.
    """
    model = FastLongSpeechForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    heard = []
    tower = model.model.audio_tower
    tower.avg_pooler.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].transpose(1, 2)))
    tower(mel.to(tower.dtype), torch.tensor([mel.shape[-1]]))
    near = 1e-4 if frames.dtype == torch.float32 else 2e-2
    if not torch.allclose(heard[0], frames, rtol=near, atol=near * float(frames.abs().max())):
        far = float((heard[0] - frames).abs().max())
        raise ValueError(f"the frames of {folder} differ from Whisper's by up to {far:.2g}; please report this.")
    turn = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    processor = FastLongSpeechProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True)
    if not torch.equal(prompt["input_ids"], ids):
        raise ValueError(f"{folder} writes a chat otherwise than its language model; please report this.")
    if not torch.equal(answer_text(model, ids), answer):
        raise ValueError(f"{folder} answers a text otherwise than its language model; please report this.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="fastlongspeech assemble",
        description="An untrained model of a Whisper and a language model; train.ctc and train.align teach it.",
    )
    parser.add_argument("--encoder", required=True, metavar="ID|FOLDER", help="a Whisper: transformers or CTranslate2")
    parser.add_argument(
        "--language-model", required=True, metavar="ID|FOLDER|GGUF", help="any causal one of transformers"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the model goes")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    arguments = parser.parse_args(argv)
    assemble(arguments.encoder, arguments.language_model, arguments.output, arguments.dtype)
    print(arguments.output)


if __name__ == "__main__":
    main()
