# The commands of README. On a fresh machine each makes .venv, installs and builds what it needs first.
PYTHON ?= python3
VENV ?= .venv
# Pinned, so that every machine tests the same thing; any torch >= 2.10 works: make TORCH=torch==2.10.0 ...
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: demo test quick op arm peer-suites bench lint wheel test-wheel docs notebooks docs-browser clean
.DELETE_ON_ERROR:

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet $(TORCH) numpy
	touch $@

# Editable, so that Python changes need no rebuild; built here (--no-build-isolation), against the torch just installed.
$(VENV)/study: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[study]"
	touch $@

# The flows of other libraries that hk.accelerate swaps: for the tests and the benchmark.
$(VENV)/peers: $(VENV)/study tests/peers.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --requirement tests/peers.txt
	touch $@

$(VENV)/test: $(VENV)/study $(VENV)/peers
	$(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/peer_suites: $(VENV)/test tests/peer_suites.txt
	$(BIN)/python -m pip install --quiet --requirement tests/peer_suites.txt
	touch $@

$(VENV)/bench: $(VENV)/study $(VENV)/peers benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

$(VENV)/lint: $(VENV)/study
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[lint]"
	touch $@

# Tools alone: nothing is compiled, and what is compiled in the tree stays.
$(VENV)/wheel $(VENV)/docs: $(VENV)/%: $(VENV)/torch pyproject.toml
	HVAE_KERNELS_SKIP_BUILD=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

demo: $(VENV)/study
	$(BIN)/hvae gaussian --dims 25 --out runs/demo --resume

# One process a core, one thread each: most tests are Python and compilers.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# In a minute and a half: each op's plain case, every error message, doctests; no interpreter, compiler or study.
quick: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --quick

# All that is tested of one op: make op OP=radial_flow.
op: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -k "$(OP)"

# The kernels on an emulated ARM machine, which `test` checks too where the packages that it names are there.
arm: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python tests/arm/check.py

# The libraries' own tests, with their flows accelerated: make peer-suites PEERS="pyro --tests pyro=../pyro".
peer-suites: $(VENV)/peer_suites
	OMP_NUM_THREADS=1 $(BIN)/python tests/peer_suites.py $(PEERS)

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --breakdown
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/draw.py
	$(BIN)/python benchmarks/autoregressive.py
	$(BIN)/python benchmarks/accelerate.py
	$(BIN)/python benchmarks/splines.py
	$(BIN)/python benchmarks/sbi.py
	$(BIN)/python benchmarks/hamiltonian.py --out benchmarks/results/flows
	$(BIN)/python benchmarks/annealed.py --out benchmarks/results/flows
	$(BIN)/python benchmarks/path_gradient.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sdist, and made from it one wheel for every Python from 3.10 and torch from 2.10 on. Torch's libraries come with
# torch: the wheel finds them in the process that has imported it.
wheel: $(VENV)/wheel
	rm -rf dist build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	$(BIN)/auditwheel show build/dist/*.whl
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(BIN)/abi3audit --strict --report dist/*.whl
	ls -l dist

# The quick tests on that wheel in an environment of its own: make test-wheel PYTHON=python3.13 TORCH=torch==2.10.0.
test-wheel:
	$(PYTHON) tests/wheel_check.py --torch "$(TORCH)"

# Strict: a broken link, a missing docstring, an image without text fails. Opens from the disk: build/site/index.html.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/_hooks/check.py build/site

# The tutorials' notebooks anew: text of docs/tutorials, code of examples, outputs where the code has changed.
notebooks: $(VENV)/test
	$(BIN)/python -m pip install --quiet ipykernel==7.4.0 nbclient==0.11.0 nbformat==5.11.1
	OMP_NUM_THREADS=1 $(BIN)/python docs/_hooks/notebooks.py

# The built pages in Debian's chromium: errors, widths, and whether the benchmarks page answers.
docs-browser: docs
	$(BIN)/python -m pip install --quiet playwright==1.65.2
	$(BIN)/python docs/_hooks/browser.py build/site --out build/pictures

clean:
	rm -rf $(VENV) build dist runs *.egg-info hvae_kernels/*.so
