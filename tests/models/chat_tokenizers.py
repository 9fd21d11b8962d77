"""Tiny tokenizers with chat templates: a token for each character, special tokens as families do.

The templates are written for these tests; each has what is particular about a family.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA = """\
{%- for message in messages -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}"""
QWEN = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif -%}
{%- if tools -%}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{#- a comment may name custom_option -#}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- endif -%}"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate') }}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
PLAIN = """\
{%- for message in messages -%}
{{ '### ' + message.role + ':\n' + message.content + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### assistant:\n' }}{%- endif -%}"""

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def made(template, special, *, bos=None, eos, pad="<pad>", adds_bos=False, plain=()):
    """A tokenizer; `special` tokens may be skipped in decoding, `plain` ones are added only."""
    names = ["<pad>", "<unk>", *special]
    backend = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*names, *CHARACTERS])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, names.index(bos))]
        )
    backend.add_special_tokens(names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


def llama():
    """The start token is written by the template and put before texts by the tokenizer too."""
    special = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>"]
    return made(LLAMA, special, bos="<|begin|>", eos="<|end_of_text|>", adds_bos=True)


def qwen():
    """ChatML with a system turn of its own, no start token, a template that knows an option."""
    return made(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|endoftext|>")


def gemma():
    """A start token, and a template that refuses a system turn."""
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return made(GEMMA, special, bos="<bos>", eos="<eos>", adds_bos=True)


def plain():
    """Turns marked by text alone; the tokenizer has a start token, the template writes none."""
    return made(PLAIN, ["<s>", "</s>"], bos="<s>", eos="</s>", adds_bos=True)


def chatml_of_added_tokens():
    """ChatML whose marks are added tokens that no one calls special."""
    template = QWEN.replace("custom_option", "nothing")
    return made(template, ["<|endoftext|>"], eos="<|endoftext|>",
                plain=["<|im_start|>", "<|im_end|>"])  # fmt: skip


FAMILIES = {
    "llama": llama,
    "qwen": qwen,
    "gemma": gemma,
    "plain": plain,
    "chatml of added tokens": chatml_of_added_tokens,
}
