"""The architecture and the character tokenizer of the bundled tiny policy."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
"""Their ids are 0 to 3, so that pad and end are the defaults of `TrainerConfig`."""


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of `alphabet`.

    Encoding puts `[BOS]` in front when special tokens are asked for; decoding joins the
    characters without spaces. A character outside the alphabet becomes `[UNK]`.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", vocabulary["[BOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def tiny_llama(
    vocabulary_size: int,
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int = 344,
) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama of about 0.8 million parameters.

    Its weights are a function of `seed`; torch's global generator is left as it was.
    """
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",  # type: ignore[call-arg]  (taken by the base class's **kwargs)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
