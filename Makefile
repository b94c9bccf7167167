# make demo and make test each work from a fresh clone; both set up .venv first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One architecture, also as PTX, runs on every GPU that wheels support and builds in a minute.
export FACELT_CUDA_ARCHS ?= 75
export FACELT_EMULATION ?= on

NATIVE := $(shell find csrc cmake -type f ! -name '*.txt') CMakeLists.txt setup.py native_build.py pyproject.toml \
	constraints.txt

.PHONY: demo test bench docs lint format wheel compilers builds sanitize clean

demo: $(VENV)/installed
	$(RUN) examples/faces.py $(ARGS)
	$(RUN) examples/attributes.py

test: $(VENV)/installed
	$(RUN) -m pytest $(ARGS)

bench: $(VENV)/installed
	$(RUN) -m benchmarks.run $(ARGS)

# The site, in build/docs; a warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	git ls-files '*.h' '*.inc' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	git ls-files '*.h' '*.inc' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

# A source distribution, and from it alone a user's wheel for all architectures, which is looked into
# and installed.
wheel: $(VENV)/installed
	rm -rf dist
	env -u FACELT_CUDA_ARCHS -u FACELT_EMULATION $(RUN) -m build --outdir dist .
	$(RUN) .ci/check_wheel.py dist/*.whl
	! command -v nvcc >/dev/null || $(RUN) .ci/resources.py dist/*.whl

# The CPU kernels by an older g++ and by clang.
compilers: $(VENV)/installed
	PYTHON=$(RUN) .ci/compilers

# Builds as users configure them: other flags, moved folders, several at once. Takes minutes.
builds: $(VENV)/installed
	env -u FACELT_CUDA_ARCHS -u FACELT_EMULATION $(RUN) -m pytest .ci/test_builds.py $(ARGS)

# The kernels, on the CPU and emulated, under AddressSanitizer and UBSan.
sanitize: $(VENV)/installed
	PYTHON=$(RUN) .ci/sanitize

$(VENV)/installed: $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build dist $(VENV) facelt_ext/_C*.so *.egg-info
