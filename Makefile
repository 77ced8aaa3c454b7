# Every target sets up what it needs in .venv and does nothing twice: one stamp an
# extra, renewed when pyproject.toml changes.

PY ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

HOOK := --jaxtyping-packages=capibara_eqx,beartype.beartype
# More than eight workers gain little and each holds its own copy of jax.
PARALLEL := -n auto --maxprocesses=8 --dist=worksteal

.DEFAULT_GOAL := help
# pip must not run twice at once in the same environment.
.NOTPARALLEL:
.PHONY: help demo test test-all test-oldest test-gpu check format notebooks bench \
	evidence tune docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PY=python3.12 chooses the Python that .venv is made with (now: $(PY));"
	@echo "ARGS='...' goes to the command that demo, notebooks, bench or evidence runs."

demo: $(STAMPS)/train ## train, resume and sample a small language model
	@$(BIN)/capibara demo $(ARGS)

test: $(STAMPS)/test ## run the tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not errors and not slow" $(HOOK) tests
	$(BIN)/python -m pytest $(PARALLEL) -m "errors and not slow" tests

test-all: $(STAMPS)/test ## run the tests, the slow ones too
	CAPIBARA_TEST_OPTIMISED=1 \
		$(BIN)/python -m pytest $(PARALLEL) -m "not errors" $(HOOK) tests
	$(BIN)/python -m pytest $(PARALLEL) -m errors tests

test-oldest: ## run the tests on the oldest dependencies that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=.venv-oldest PIN=yes test

# Without TF32, in which XLA multiplies float32 matrices there if it may. C++ runs on a
# CPU alone. One process: several would divide the GPU's memory among themselves.
test-gpu: $(STAMPS)/test ## run the kernels' tests on a GPU, where jax[cuda13] is installed
	JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest \
		XLA_PYTHON_CLIENT_PREALLOCATE=false \
		$(BIN)/python -m pytest -m "not errors" $(HOOK) \
		--ignore-glob='*/test_native_*' tests/kernels tests/benchmarks/test_gpu.py

check: $(STAMPS)/dev ## lint, formatting, types and architecture
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(STAMPS)/dev ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(STAMPS)/notebooks ## execute the notebooks and keep their outputs
	$(BIN)/python notebooks/run.py $(ARGS)

bench: $(STAMPS)/peers ## measure, beside the peers, and record under benchmarks/results
	$(BIN)/python -m benchmarks $(ARGS)

evidence: $(STAMPS)/peers ## train small models on tasks that tell layers apart, record
	$(BIN)/python -m benchmarks.evidence $(ARGS)

tune: $(STAMPS)/test ## measure the kernels' block sizes here and note the best
	$(BIN)/python -m benchmarks.tune

docs: $(STAMPS)/docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## delete the environments, the caches and what was built
	rm -rf .venv .venv-oldest .cache .hypothesis .pytest_cache .ruff_cache
	rm -rf build dist site
	find src tests benchmarks notebooks -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true

# An environment whose pip does not run is a half-made one, and is made again.
$(STAMPS)/venv:
	@set -u; say() { printf '%s\n' "$$*" >&2; }; \
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' \
			2>/dev/null; then \
		if ! found=$$("$(PY)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		then \
			say "$(PY) does not run: install Python >= 3.11, or name one:" \
				"make $(MAKECMDGOALS) PY=python3.12"; \
			exit 1; \
		fi; \
		case $$found in 3.1[1-9]|3.[2-9][0-9]) ;; *) \
			say "need Python >= 3.11, found $$found ($(PY));" \
				"try: make $(MAKECMDGOALS) PY=python3.12"; \
			exit 1;; \
		esac; \
		say "Making $(VENV) with Python $$found"; \
		if ! "$(PY)" -c 'import venv; from ensurepip import version' 2>/dev/null \
			|| ! "$(PY)" -m venv --clear $(VENV); \
		then \
			say "$(PY) cannot make virtual environments. On Debian and Ubuntu its" \
				"modules venv and ensurepip are a package of their own:"; \
			say "sudo apt install python3-venv (python$$found-venv where $(PY) is" \
				"not the system's own), then: make $(MAKECMDGOALS)"; \
			exit 1; \
		fi; \
	fi; \
	mkdir -p $(STAMPS); touch $@

$(STAMPS)/%: pyproject.toml | $(STAMPS)/venv
	@printf '%s\n' "Installing capibara-eqx[$*] into $(VENV) (the first time takes minutes)" >&2
ifdef PIN
	@$(BIN)/python .ci/lower_bounds.py pyproject.toml $* > $(STAMPS)/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(STAMPS)/constraints.txt --editable '.[$*]'
else
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
endif
	@touch $@
