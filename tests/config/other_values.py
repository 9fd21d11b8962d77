"""For every field of the settings tables a value that no member has by default."""

OBJECTIVE = {
    "mean": "ahm", "ahm_weight": 0.3, "p": 0.3, "p_positive": 0.5, "p_negative": 0.5,
    "gate": "detached", "gate_positive": 2.0, "gate_negative": 2.0, "clip_level": "token",
    "clip_space": "log", "clip_low": 0.1, "clip_high": 0.1, "clip_width": "z", "clip_sigma": 0.1,
    "clip_center": "drift", "clip_share": 0.1, "clip_rollouts": 3, "sign_convention": "paper",
    "dual_clip": 3.0, "reduction": "token_mean", "max_length": 9, "kl_coef": 0.5,
    "kl_estimator": "k1", "token_clamp": 0.05, "segments": "turn", "proximal_coef": 0.5,
    "proximal": "pearson", "entropy_coef": 0.5, "entropy_target": 9.0,
    "entropy_coef_delta": 0.5, "entropy_coef_max": 0.1,
}  # fmt: skip
"""Fields of `ObjectiveConfig` but `name`, `exponent` and `weight`."""

WEIGHT = {
    "kind": "inverse", "level": "sequence", "bound": "mask", "cap": 0.9, "power_positive": 0.5,
    "power_negative": 0.5, "decay_positive": 0.5, "decay_negative": 0.5,
}  # fmt: skip
"""Fields of `WeightConfig`."""

EXPONENT = {
    "kind": "matched", "end": 1.0, "updates": 3, "criterion": "variance", "target": 0.5,
    "bound": 2.0, "lr": 0.1, "saturation": 0.5, "matching": "closed_form", "gamma": 0.1,
    "clip_gain": 0.1, "per": "rollout",
}  # fmt: skip
"""Fields of `ExponentConfig`, less the permission `allow_surrogate`."""

MISMATCH = {
    "recompute": True, "correction": "mask", "level": "sequence", "low": 0.5, "high": 3.0,
    "sequence_low": 0.5, "sequence_high": 2.0, "off_policy_low": 0.5,
}  # fmt: skip
"""Fields of `MismatchConfig`."""

ADVANTAGES = {
    "estimator": "rloo", "over": "tokens", "kl_in_reward": 0.5, "kl_estimator": "k3",
    "kl_over": "mean",
}  # fmt: skip
"""Fields of `AdvantageConfig`."""

TRAINER = {
    "group_size": 8, "max_length": 9, "eos_token": 7, "pad_token": 3, "temperature": 0.5,
    "top_k": 3, "top_p": 0.5, "decoder": "module", "sampling_dtype": "bfloat16",
    "minibatches": 2, "epochs": 2, "micro_batch_size": 2, "advantage_scale": "none",
    "std_ddof": 0, "max_grad_norm": 0.5, "lr_schedule": "linear", "warmup_updates": 2,
    "total_updates": 9, "autocast": "bfloat16", "qk_clip": False, "max_qk_score": 5.0,
    "mask_truncated": True, "on_nonfinite": "stop", "max_nonfinite": 3,
    "on_reward_error": "skip", "reward_timeout": 1.0, "logprob_chunk": 8, "seed": 3,
}  # fmt: skip
"""Fields of `TrainerConfig`."""
