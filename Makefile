# Needs python3 (3.11 or newer), git and make. Every line can also be typed by hand.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
VLLM ?= .venv-vllm
JOBS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
HASH = import hashlib, os, sys; print(hashlib.sha256(os.getcwd().encode() + b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest()[:16])
RUN := $(VENV)/run-$(shell $(PYTHON) -c '$(HASH)' requirements.txt).stamp
DEV := $(VENV)/dev-$(shell $(PYTHON) -c '$(HASH)' requirements.txt requirements-dev.txt).stamp
PEER := $(PEERS)/peers-$(shell $(PYTHON) -c '$(HASH)' requirements-peers.txt pyproject.toml).stamp
SERVER := $(VLLM)/vllm-$(shell $(PYTHON) -c '$(HASH)' requirements-vllm.txt).stamp
PEER_TESTS = $(wildcard tests/adapters/test_verl.py tests/adapters/test_verl_ray.py tests/differential tests/lab/suite/test_on_ray.py tests/environments/test_verif*.py tests/tasks/test_verif*.py)
QUICK = $(foreach slow,adapters differential run test_run.py,--ignore=tests/$(slow))
NUMERIC = python -m pytest -q -n $(JOBS) --dist worksteal -m numeric
OLD_CPU = OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
AVX2_CPU = OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test check test-processors test-kills test-ranks-kills test-probes test-models test-verl test-vllm peers peers-test bench docs clean
demo: $(RUN) # trains the bundled policy; makes .venv first where needed
	$(VENV)/bin/hmpo demo
test: $(DEV) peers-test # the whole gate; makes .venv and .venv-peers first where needed
	PATH="$(abspath $(VENV)/bin):$$PATH" $(MAKE) check
check: docs # the whole gate in the present environment
	ruff format --check .
	ruff check .
	pyrefly check
	lint-imports
	$(OLD_CPU) $(NUMERIC) $(QUICK)
	OMP_NUM_THREADS=1 python -m pytest -q -n $(JOBS) --dist worksteal
test-processors: # the numeric tests as other processors and libraries would round them
	$(OLD_CPU) $(NUMERIC)
	$(AVX2_CPU) $(NUMERIC)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(NUMERIC)
	OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE $(NUMERIC)
	OMP_NUM_THREADS=2 $(NUMERIC)
test-kills test-ranks-kills: # SIGKILLs of runs, hundreds, and of single ranks; benchmarks/results
	OMP_NUM_THREADS=1 python -m benchmarks.$(if $(findstring ranks,$@),ranks_kills,kill_and_resume)
test-models test-probes: # every architecture of transformers; reported faults in hmpo, TRL and (make peers) verl
	$(if $(findstring probes,$@),HMPO_ALL_PROBES=1 python -m pytest -q -n $(JOBS) --dist worksteal tests/fault_probes && python -m benchmarks.fault_probes && $(PEERS)/bin/python -m benchmarks.fault_probes verl && python scripts/make_fault_probes.py,OMP_NUM_THREADS=1 python -m tests.models_matrix.run && python scripts/make_models_page.py)
test-verl: $(PEER) # verl's own trainer over two workers; benchmarks/results/verl_ray.json
	$(PEERS)/bin/python -m benchmarks.verl_ray
test-vllm: $(DEV) $(SERVER) # rollouts from a real vLLM server, in .venv-vllm
	OMP_NUM_THREADS=1 HMPO_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(VENV)/bin/python -m pytest -q tests/engines/test_real_vllm.py
peers: $(PEER) # the second environment, .venv-peers: verl, OpenRLHF and verifiers
peers-test: $(PEER) # what is compared with them and runs inside them
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(PEER_TESTS)
bench: $(PEER) # every timing but the GPU's, then tables and plots; verl from .venv-peers
	for f in $(filter-out %_gpu.py,$(sort $(wildcard benchmarks/bench_*.py))) benchmarks/rollout_parts.py benchmarks/update_tried.py; do python $$f || exit 1; done
	python benchmarks/bench_trl.py --options && $(PEERS)/bin/python benchmarks/objective.py
	python scripts/make_performance_plots.py && python scripts/make_tables.py
docs: # the site, in site/
	zensical build --clean --strict
clean:
	rm -rf site dist build .cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(RUN):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("hmpo needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.12" % v)'
	rm -f $(VENV)/*.stamp && $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q torch==2.13.0
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	$(VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
$(DEV): $(RUN)
	rm -f $(VENV)/dev-*.stamp && $(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	@touch $@
$(PEER):
	rm -f $(PEERS)/*.stamp && $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q torch==2.13.0
	$(PEERS)/bin/python -m pip install -q --no-deps -r requirements-peers.txt
	$(PEERS)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
$(SERVER):
	rm -f $(VLLM)/*.stamp && $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0
	$(VLLM)/bin/python -m pip install -q --no-deps -r requirements-vllm.txt
	@touch $@
