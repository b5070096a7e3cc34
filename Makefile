# Umbra. `make help` lists the targets.

CARGO ?= cargo
CARGO_HOME ?= $(HOME)/.cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
TRIPLE := x86_64-unknown-linux-gnu
# The same sources give the same binary in every directory: the lab's image holds it, and the image's bytes are part of a figure. These flags
# are added to those of .cargo/config.toml (the environment's RUSTFLAGS would replace them).
REMAP := --config 'target.$(TRIPLE).rustflags=["--remap-path-prefix=$(CURDIR)=/umbra","--remap-path-prefix=$(CARGO_HOME)=/cargo"]'

.PHONY: build help

build: ## Build target/umbra
	$(CARGO) build --release --locked $(REMAP)
	mkdir -p target
	cp $(CARGO_TARGET_DIR)/$(TRIPLE)/release/umbra target/umbra.new
	mv target/umbra.new target/umbra

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
