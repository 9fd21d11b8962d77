"""What verl's own `main_ppo` needs to train on CPU: put in through its registries and settings.

`VERL_USE_EXTERNAL_MODULES` imports `platform` and `rollout` into every process of a run, and
`actor_rollout_ref.model.external_lib` imports `worker` where a policy is trained. Nothing of verl
is replaced. `run` starts a run and ends all its processes, `replay` repeats its updates in plain
torch. `python -m benchmarks.verl_ray` does both (`make test-verl`).
"""
