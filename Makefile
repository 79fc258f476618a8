# Every target is one call of deploy/bootstrap.py, which needs Python 3.11 and pip alone.
PYTHON ?= python3
BOOTSTRAP = $(PYTHON) deploy/bootstrap.py

.PHONY: up compile test check format bench-core release clean

up:  ## serve two simulated replicas, or CONFIG=file.yaml
	@$(BOOTSTRAP) up $(CONFIG) $(ARGS)

compile:  ## translate the data path to machine code: half the price; needs a C compiler
	@$(BOOTSTRAP) compile

test:  ## every check and every test; ARGS go to pytest
	@$(BOOTSTRAP) test $(ARGS)

check:  ## the checks that run no test
	@$(BOOTSTRAP) check

format:  ## rewrite the sources in the project's form
	@$(BOOTSTRAP) format

bench-core:  ## what the pure core costs, against the table that is kept; ARGS=--write keeps the new one
	@$(BOOTSTRAP) bench-core $(ARGS)

release:  ## wheel, sources and bill of materials in dist/; ARGS=--draft before its time
	@$(BOOTSTRAP) release $(ARGS)

clean:  ## remove .venv and every cache
	@$(BOOTSTRAP) clean
