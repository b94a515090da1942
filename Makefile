# Everything happens in .venv, which is made once and again whenever pyproject.toml or the constraints change.
# Another interpreter: make PYTHON=python3.12 test      More extras: make EXTRAS=dev,train test
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
DEMO_ARGS ?=
REHEARSE_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.perceptio-installed

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help env env-newest demo test test-oldest test-oldest-quick test-newest test-between test-arithmetic test-arithmetic-quick test-formats test-sam2 test-lmms-eval test-engines test-ray test-track test-zero3 test-app rehearse plan lint clean

help:
	@echo "make demo   render a scene, ask the embedded model about it, write pictures to perceptio-demo/"
	@echo "make test   run the tests"
	@echo "make test-oldest   the quick tests with the oldest releases that are supported, in an environment of their own"
	@echo "make test-newest   the same, the training tests and the demo with the newest releases in range, asked for at every run"
	@echo "make test-arithmetic   the numerical tests with other kernels and threads; test-arithmetic-quick: some of them"
	@echo "make test-formats  exports of the codec to ONNX and 8-bit weights, with what reads them"
	@echo "make test-between  what leans on transformers, with a release of each series between the oldest and the tested one"
	@echo "make test-sam2     converted SAM2 weights beside Meta's own code, which this installs"
	@echo "make test-lmms-eval   the plug-in inside lmms-eval, which this installs"
	@echo "make test-ray      predict, eval and label on several workers of Ray, which this installs"
	@echo "make test-engines  exported folders in transformers serve and under the grammars of xgrammar, llguidance and outlines, which this installs"
	@echo "make test-track    figures and pictures of a training where it reports to, which this installs"
	@echo "make test-zero3    a training by the configuration of DeepSpeed's ZeRO-3 on two CPU processes, which this installs"
	@echo "make test-app      the page in a real browser, which this installs; SCREENSHOTS=docs/images takes README's pictures"
	@echo "make rehearse   label, train, measure and push a small random one by the commands for a real one, into runs/rehearsal"
	@echo "make plan   draw the figures of the documents: the imports, a span that converges, five demos"
	@echo "make lint   ruff check and ruff format --check"
	@echo "make env    only make the environment in $(VENV)"
	@echo "make clean  remove the environment and caches"

env: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "perceptio-hf needs Python 3.10 or newer, not %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Making the environment in $(VENV) (once; downloads PyTorch and transformers, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/perceptio demo $(DEMO_ARGS)

# Two processes with one thread each are faster on small models than one process with two threads. Each begins with a half
# of its own, so that what a file's tests share is made once, and takes from the other's when it is done.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(TEST_ARGS)

# What meets transformers' and the Hub's own code.
OLDEST_TESTS := tests/modeling tests/processing tests/conversion tests/hub tests/test_registration.py
test-oldest:
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TEST_ARGS='-m "not slow" $(OLDEST_TESTS)'

# Of these what leans on releases most, and a training.
OLDEST_QUICK := $(addprefix tests/modeling/test_,versions.py perceptio.py generation.py transformers_ways.py shards.py placement.py) \
	$(addprefix tests/processing/test_,processing_perceptio.py pictures.py) tests/conversion/test_opengvlab.py \
	tests/hub/test_upload.py tests/test_registration.py \
	$(addprefix tests/training/test_,trainer.py lora.py adapters_elsewhere.py)
test-oldest-quick:
	@$(MAKE) --no-print-directory test-oldest OLDEST_TESTS='$(OLDEST_QUICK)'

# Every run asks pip for newer releases of everything in pyproject.toml's ranges, so that a new one is noticed here before
# users meet it. torch alone stays as it is in the constraints: another comes with several GB of CUDA on Linux. Among the
# tests are those that load a checkpoint by the code it carries, in processes without this package. With the releases of
# the constraints `make test` has run them: where no other is newer than Pillow's, what reads pictures is left to try.
NEWEST := .venv-newest
NEWEST_TESTS := $(OLDEST_TESTS) tests/training
PICTURE_TESTS := tests/processing tests/data
NEWEST_NAMES := torch transformers huggingface_hub accelerate safetensors numpy pillow trl peft datasets
NEWER := import sys; from importlib.metadata import version; from pathlib import Path; \
	tested = {line.split(" ;")[0].strip() for line in Path("$(CONSTRAINTS)").read_text().splitlines()}; \
	print(*(name for name in sys.argv[1:] if f"{name}=={version(name).partition(chr(43))[0]}" not in tested))
env-newest:
	@echo "Bringing $(NEWEST) up to date (the first time a few minutes) ..."
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-e ".[$(EXTRAS)]" "$$(grep '^torch==' $(CONSTRAINTS))"

test-newest: env-newest
	@$(NEWEST)/bin/python -c 'import sys; from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep=", ")' $(NEWEST_NAMES)
	@newer="$$($(NEWEST)/bin/python -c '$(NEWER)' $(NEWEST_NAMES))" || exit 1; \
	case "$$newer" in "") tests="";; pillow) tests="$(PICTURE_TESTS)";; *) tests="$(NEWEST_TESTS)";; esac; \
	echo "Newer than tested: $${newer:-none}"; \
	test -z "$$tests" || OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" $$tests $(TEST_ARGS)
	@out="$$(mktemp -d)" && $(NEWEST)/bin/perceptio demo --out "$$out"; status=$$?; rm -rf "$$out"; exit $$status

# The way of docs/train_a_real_one.md with small random stand-ins in the layouts of the real ones; goes on where it was stopped.
rehearse: $(STAMP)
	@$(BIN)/python benchmarks/rehearse.py $(REHEARSE_ARGS)

# What MKL, PyTorch and oneDNN compute on other processors, on this one. A round is settings joined by commas.
OTHER_KERNELS := MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
ARITHMETIC_ROUNDS := $(OTHER_KERNELS:%=%,OMP_NUM_THREADS=1) $(OTHER_KERNELS:%=%,OMP_NUM_THREADS=2)
ARITHMETIC_QUICK := $(addprefix tests/modeling/test_,depth_vqvae.py perceptio.py criterion.py) \
	$(addprefix tests/build/test_,from_components.py checkpoint_foreign.py token_rows.py) \
	tests/conversion/test_aurora.py tests/training/losses/test_parts.py
ARITHMETIC_TESTS := tests/modeling tests/build tests/training tests/lab/lessons/test_conversation_lesson.py \
	$(addprefix tests/conversion/test_,export.py aurora.py opengvlab.py sa2va.py) \
	tests/evaluation/run/test_runner.py tests/commands/test_train.py tests/hub/test_upload.py
test-arithmetic: $(STAMP)
	@set -e; for settings in $(ARITHMETIC_ROUNDS); do \
		echo "$$settings"; case "$$settings" in *THREADS=2) workers=1;; *) workers=2;; esac; \
		env $$(echo "$$settings" | tr , ' ') $(BIN)/python -m pytest -q -n $$workers --dist worksteal -m "not slow" $(TEST_ARGS) $(ARITHMETIC_TESTS); \
	done

test-arithmetic-quick:
	@$(MAKE) --no-print-directory test-arithmetic ARITHMETIC_TESTS='$(ARITHMETIC_QUICK)' ARITHMETIC_ROUNDS="\
		MKL_CBWR=COMPATIBLE,ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=SSE41,OMP_NUM_THREADS=1 MKL_CBWR=AVX2,OMP_NUM_THREADS=2"

# transformers changes its insides between two releases and back: 5.20 alone refuses what 5.19 and 5.21 take.
BETWEEN := 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0
BETWEEN_TESTS := tests/modeling/test_versions.py tests/modeling/test_perceptio.py tests/test_registration.py
test-between: $(STAMP)
	@for version in $(BETWEEN); do \
		folder="$(CURDIR)/.venv-between/$$version"; \
		test -d "$$folder/transformers" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
			--target "$$folder" "transformers==$$version" || exit 1; \
		echo "transformers $$version"; \
		PYTHONPATH="$$folder" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(BETWEEN_TESTS) || exit 1; \
	done

# What reads exported codecs and 8-bit weights.
test-formats: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) onnxscript onnxruntime torchao
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/modeling/test_codec_graphs.py tests/modeling/test_quantization.py

# sam2 asks for torchvision, which this comparison does without.
test-sam2: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) setuptools hydra-core iopath
	@SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation sam2==1.1.0
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/conversion/test_sam2.py

# lmms-eval asks for torchvision and with it for another torch; these are what its imports need beside ours.
LMMS_EVAL_NEEDS := jsonlines loguru openpyxl pydantic pytablewriter python-dotenv sacrebleu scikit-learn tenacity tqdm-multiprocess
test-lmms-eval: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) $(LMMS_EVAL_NEEDS)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) --no-deps lmms-eval
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations

# In an environment of their own, which sees everything in $(VENV): xgrammar asks for triton, which no CPU needs.
ENGINES := .venv-engines
GRAMMAR_ENGINES := xgrammar==0.2.8 apache-tvm-ffi llguidance==1.9.1 outlines_core
SERVER_NEEDS := fastapi uvicorn openai requests
test-engines: $(STAMP)
	@test -x $(ENGINES)/bin/python || $(BIN)/python -m venv $(ENGINES)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/perceptio.pth"
	@$(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(GRAMMAR_ENGINES)
	@$(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) $(SERVER_NEEDS)
	@OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -q -n 2 tests/conversion/test_engine_grammars.py tests/conversion/test_transformers_serve.py

test-track: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e ".[track]"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/evaluation/during

# DeepSpeed is built from source, and wants to see torch then.
test-zero3: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) einops hjson msgpack ninja psutil py-cpuinfo pydantic setuptools wheel
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation deepspeed==0.19.8
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/training/test_zero3.py

test-ray: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) "ray[data]==2.60.0"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/bulk/test_ray_engine.py tests/labelling/test_ray.py

# Debian's Chromium, driven by Playwright: no browser is downloaded from elsewhere.
SCREENSHOTS ?=
test-app: $(STAMP)
	@command -v chromium >/dev/null || { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) -e ".[app]" playwright
	@PERCEPTIO_SCREENSHOTS=$(SCREENSHOTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/app

plan: $(STAMP)
	@$(BIN)/python docs/draw_architecture.py
	@$(BIN)/python docs/draw_span.py
	@$(BIN)/python docs/draw_gallery.py

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-oldest $(NEWEST) .venv-between $(ENGINES) .pytest_cache .ruff_cache .hypothesis
