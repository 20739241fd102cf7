# Python >= 3.11; `make PYTHON=/path/to/python3.12 install` takes another one than the first that is found.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
ARGS ?=
# Where tests keep their servers' data: a memory file system that has room and runs programs, else the usual place.  Their
# thousands of commits wait for a disk otherwise, which nothing in them is about.
TEST_TMPDIR ?= $(shell test $$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1) -gt 4194304 2>/dev/null && \
	at=$$(mktemp -d /dev/shm/voucherd-XXXXXX) && : >$$at/run && chmod +x $$at/run && $$at/run && \
	echo /dev/shm; rm -rf "$$at")
SECRETS ?= deploy/secrets

.DEFAULT_GOAL := help
.PHONY: help install run test check lua alerts bench bench-flush bench-import bench-memory bench-outbox bench-recover \
	bench-scale bench-script chaos chaos-import chaos-rows chaos-whole compare-install dashboard image-test loadtest \
	manifests manifests-install mutations postman rolling secrets sim

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## prepare .venv with everything pinned (quick the second time)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "voucherd needs Python 3.11 or later: make PYTHON=/path/to/python3.11 install"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: install ## start everything on this machine, data in ./var (ARGS='--port 9090')
	@exec $(BIN)/voucherd up $(ARGS)

test: install ## run the unit, integration and acceptance tests (ARGS='-k replay')
	TMPDIR=$(or $(TEST_TMPDIR),$${TMPDIR:-/tmp}) $(BIN)/python -m pytest tests --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: install lua ## ruff, types, the arrows between modules, luacheck, the Lua contract test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/unit/test_lua_contract.py

lua: ## luacheck alone
	@if command -v luacheck >/dev/null; then luacheck --quiet lua; \
	else echo "luacheck is missing, the Lua scripts were not linted (Debian's package is lua-check)"; fi

bench: install ## CPU per voucher, next to a no-op application and (make compare-install) other services
	$(BIN)/python -m loadtest.bench $(ARGS)

bench-flush: install ## CPU of writing issued vouchers to the ledger, on PostgreSQL
	$(BIN)/python -m loadtest.flush $(ARGS)

bench-recover: install ## a million replay records restored after a loss of Redis, issuing meanwhile
	$(BIN)/python -m loadtest.recover $(ARGS)

bench-import: install ## an import next to \copy, and issuing meanwhile (ARGS='--codes 10000000')
	$(BIN)/python -m loadtest.imports $(ARGS)

bench-memory: install ## bytes a replay record and a code, and a serving process over 2 million requests
	$(BIN)/python -m loadtest.memory $(ARGS)

bench-outbox: install ## whether the ledger keeps up for ten minutes at 70 % (ARGS='--minutes 1')
	$(BIN)/python -m loadtest.outbox $(ARGS)

bench-scale: install ## CPU per voucher at any size, and a publication (ARGS='--records 1000000 --codes 1000000')
	$(BIN)/python -m loadtest.scale $(ARGS)

bench-script: install ## what the issue script costs a voucher, with and without a rate limit and traces
	$(BIN)/python -m loadtest.script $(ARGS)

compare-install: install ## what loadtest/compare needs: FastAPI into .venv, Fastify by npm where there is Node
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	@if ! command -v node >/dev/null; then echo "node is missing: going on without the Fastify service"; \
	elif ! command -v npm >/dev/null; then echo "npm is missing: going on without the Fastify service"; \
	else cd loadtest/compare/fastify && npm install --omit=dev --no-audit --no-fund; fi

loadtest: install ## load by locust and what came of it (SCENARIO=retry-storm WORKERS=2; without SCENARIO: lists them)
	@$(BIN)/python -m loadtest.scenarios $(SCENARIO) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

chaos: install ## every fault at random on real processes, then every promise checked (SEED=7 MINUTES=30)
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

chaos-rows: install ## each fault alone, on PostgreSQL with Valkey and SQLite with Redis (ARGS='-k row_09')
	$(BIN)/python -m pytest tests/chaos --chaos all $(ARGS)

chaos-whole: chaos-rows chaos ## each fault alone, then all at random

rolling: install ## every process restarted under load, ten rounds (ARGS='--upgrade-from COMMIT': from an older version)
	$(BIN)/python -m pytest tests/acceptance/test_rolling.py --restarts 10 -s $(ARGS)

image-test: install ## the image built, and run as deploy/compose.yaml says, by docker or podman
	$(BIN)/python -m pytest tests/acceptance/test_image.py --image -s $(ARGS)

secrets: install ## deploy/secrets: passwords and keys for deploy/compose.yaml, made once
	@mkdir -p -m 700 $(SECRETS)
	@# One that is empty is of a run that was cut off; it may be closed to its owner, so another takes its place.
	@set -e; for name in redis_voucherd_password redis_operator_password store_password grafana_password; do \
		if test -s $(SECRETS)/$$name; then continue; fi; \
		rm -f $(SECRETS)/$$name; \
		$(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(32))' > $(SECRETS)/$$name; \
	done
	@test -s $(SECRETS)/voucherd_secrets || { rm -f $(SECRETS)/voucherd_secrets; \
		$(BIN)/voucherd keys create $(SECRETS)/voucherd_secrets; }
	@for name in alertmanager_page alertmanager_ticket; do \
		test -s $(SECRETS)/$$name || echo "fill in the key of $$name" > $(SECRETS)/$$name; done
	@chmod 444 $(SECRETS)/*  # a container's user is another one; the directory is closed
	@chmod 644 $(SECRETS)/alertmanager_*  # an operator fills them in

manifests-install: install ## what `make manifests` needs: kubectl and schemas, into .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,deploy]'

manifests: manifests-install ## deploy/kubernetes held against schemas and put together by kustomize
	$(BIN)/python -m pytest tests/unit/test_deployment.py $(ARGS)

mutations: install ## six faults in our own code, each of which must make its test red
	$(BIN)/python -m tests.chaos.mutations $(ARGS)

chaos-import: install ## imports killed at 50 random moments on each store (ARGS='--seed 7')
	$(BIN)/python -m pytest tests/integration/test_import_killed.py --kills 50 --numprocesses $(JOBS) $(ARGS)

alerts: install ## deploy/kubernetes/monitoring/alerts.yaml: the PrometheusRule, from the rules as they are
	$(BIN)/python -m deploy.kubernetes.alerts > deploy/kubernetes/monitoring/alerts.yaml

dashboard: install ## deploy/grafana/voucherd.json: the Grafana dashboard, from the metrics as they are
	$(BIN)/python -m deploy.grafana.dashboard > deploy/grafana/voucherd.json

postman: install ## docs/postman.json: both APIs as a Postman collection
	$(BIN)/python -m service.web.postman > docs/postman.json

sim: install ## the long simulation: 10,000 schedules (ARGS='--seed 7')
	$(BIN)/python -m tests.simulation --schedules 10000 $(ARGS)
