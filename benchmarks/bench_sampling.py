"""Group rollouts against Hugging Face `generate` called as TRL calls it (prompts repeated).

python benchmarks/bench_sampling.py
"""

import torch
from common import alternate, one_thread, save
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.sampling import sample_responses

GROUP = 8
NEVER = 10_000  # no row ends early: both sides make the same number of tokens


def main() -> None:
    """Measure a 1M-parameter model at three workloads."""
    one_thread()
    rows = []
    for prompts, prompt_length, new in ((16, 32, 64), (4, 32, 64), (4, 256, 32)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=344,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=1024,
            )
        ).eval()
        ids = torch.randint(3, 512, (prompts, prompt_length))
        mask = torch.ones_like(ids, dtype=torch.bool)

        def ours(model=model, ids=ids, mask=mask, new=new) -> None:
            sample_responses(model, ids, mask, group_size=GROUP, max_length=new, eos_token=NEVER)

        def theirs(model=model, ids=ids, mask=mask, new=new) -> None:
            model.generate(
                ids.repeat_interleave(GROUP, 0),
                attention_mask=mask.long().repeat_interleave(GROUP, 0),
                do_sample=True,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=2,
                pad_token_id=0,
            )

        seconds = alternate({"generate": theirs, "hmpo": ours}, repeats=5)
        rows.append(
            {
                "prompts": prompts,
                "group": GROUP,
                "prompt_tokens": prompt_length,
                "new_tokens": new,
                "generate_cpu_s": round(seconds["generate"], 3),
                "hmpo_cpu_s": round(seconds["hmpo"], 3),
                "ratio": round(seconds["hmpo"] / seconds["generate"], 3),
            }
        )
    save("sampling", "python benchmarks/bench_sampling.py", rows)


if __name__ == "__main__":
    main()
