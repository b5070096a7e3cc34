# Umbra's commands; `make help` lists them. Each target installs with apt what it lacks, so none needs a step before it.
#
#   ARGS       options of `umbra` for run, lab-*, soak       make run ARGS='--memory 256M --tracker ring'
#   SECONDS    how long soak and fuzz-tables run
#   SEED, N    where fuzz begins and how many operations it does; a failure prints a script for REPLAY=FILE
#   SUITES     the Debian releases that test-fresh tries
#   A, B       two kernels for ab: names of the shelf, or files, whose modules are in A_MODULES and B_MODULES; without B it is A
#   A_PARAMS, B_PARAMS   module parameters of both, and of B alone         make ab A=6.12 B_PARAMS=kvm.tdp_mmu=N
#   S, OVER    the scenario with its options that ab compares by, and the percent above which it fails

ARGS    ?=
SECONDS ?= 60
SEED    ?= 1
N       ?= 10000000
SUITES  ?= bookworm trixie
S       ?= dirty-log
OVER    ?= 1

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

# A chroot or a service may have no HOME; cargo and the shelf of kernels want one.
ifeq ($(HOME),)
export HOME := $(shell getent passwd "$$(id -u)" | cut -d: -f6)
endif
CARGO_HOME ?= $(HOME)/.cargo

# How Umbra is built stands in Cargo.toml, .cargo/config.toml and here, not in the environment.
unexport RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_TARGET_DIR CARGO_BUILD_TARGET_DIR CARGO_BUILD_TARGET
TARGET := x86_64-unknown-linux-gnu
# No path of this machine enters the binary: it is the same wherever the project and cargo's home lie.
REMAP  := target.$(TARGET).rustflags=['--remap-path-prefix=$(CARGO_HOME)=/cargo','--remap-path-prefix=$(CURDIR)=/umbra']
UMBRA  := target/umbra

# The oldest Rust that builds Umbra, as Cargo.toml says; the one on the PATH if it is new enough, else Debian's in /usr/bin.
RUST       := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
new_enough := for tool in cargo rustc; do printf '%s\n' $(RUST) "$$($$tool --version 2>/dev/null | cut -d' ' -f2)" | sort -CV || exit 1; done
ifneq ($(shell ($(new_enough)) && echo yes),yes)
export PATH := /usr/bin:$(PATH)
endif

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z%-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r target line; do
	    printf '  make %-16s %s\n' "$$target" "$$line"
	done

.PHONY: run
run: lab-dirty-log ## what a page costs under each dirty-tracking interface: a real kernel's KVM in the lab, 64 MiB

.PHONY: test
test: build shelf packages-vmx packages-bench ## every check: format, lints, unit, property and integration tests, lab runs, this machine's KVM
	@if cargo fmt --version >/dev/null 2>&1; then
	    echo 'format'
	    cargo fmt --all --check
	else
	    $(call absent,rustfmt,format)
	fi
	if cargo clippy --version >/dev/null 2>&1; then
	    echo 'lints'
	    cargo clippy --locked --workspace --exclude umbra-guest-fw --all-targets -- -D warnings
	    cargo clippy --locked --package umbra-guest-fw --all-targets -- -D warnings
	else
	    $(call absent,clippy,lints)
	fi
	# The sums of all test programs. One that prints none of its own (lab_deaths) is one test; the last one, if cut off, has failed.
	sums() {
	    awk '/^ +(Running|Doc-tests) /  { passed += open; open = 1 }
	         /^test result:/            { passed += $$4; failed += $$6; skipped += $$8; open = 0 }
	         /^error: test failed/      { failed += open; open = 0 }
	         END { printf "\n%d passed, %d failed, %d skipped\n", passed, failed + open, skipped }' target/test.log
	}
	trap sums EXIT
	# The firmware by itself: beside the monitor its dependencies would get the features that the monitor's need, std among them.
	{
	    held=0
	    cargo test --locked --package umbra-guest-fw --lib --no-fail-fast || held=$$?
	    cargo test --locked --workspace --exclude umbra-guest-fw --no-fail-fast || held=$$?
	    # Each of these is one test.
	    one() { if "$$@"; then echo 'test result: ok. 1 passed; 0 failed; 0 ignored'; else held=$$?; echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored'; fi; }
	    one $(mmu) fuzz -- SEED=$(SEED) N=1000000
	    one $(mmu) bench_mmu -- MIB=64,1024 ROOM=10
	    exit $$held
	} 2>&1 | tee target/test.log

# A check whose tool is not here is passed over, with a line that says so; in CI that is an error.
absent = echo '$(2): not checked, because cargo has no $(1) here'; if [ "$${CI:-}" = true ]; then exit 1; fi

.PHONY: build
build: packages ## target/umbra: static, and the same bytes wherever it is built
	@cargo build --locked --release --config "$(REMAP)"
	install -C target/$(TARGET)/release/umbra $(UMBRA)

lab-%: build shelf ## any scenario in the lab (lab-dirty-log, lab-soak, ...), with options in ARGS
	@$(UMBRA) lab $* $(ARGS)

lab-vmx-%: build shelf packages-vmx ## the same in the lab's Intel machine, with EPT and PML (lab-vmx-dirty-log, ...)
	@$(UMBRA) lab --machine vmx $* $(ARGS)

.PHONY: bench-nested
bench-nested: build shelf ## what a guest's guest costs: on Umbra's shadow MMU, under KVM's own nesting, beside L1's own writes; in the lab
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/nested.toml --out target/bench/nested.json $(ARGS)

.PHONY: edits
edits: build shelf ## 10,000 random edits of L1's table: what L2 sees, on KVM's nested SVM, Umbra's shadow MMU and its walker; and edits that race L2
	@edits='edits --memory 4M --alias 2 --edits 10000 --strategy log,write-protect'
	$(UMBRA) lab --clock wall $$edits --mechanism kvm-clear,mprotect $(ARGS)
	$(UMBRA) lab --clock wall $$edits --mechanism kvm-clear,mprotect --race --vcpus 2 $(ARGS)
	$(UMBRA) run $$edits --race --vcpus 2 $(ARGS) || [ $$? = 3 ]

.PHONY: hostile
hostile: build shelf ## 100,000 cases of a malicious L1 against the monitor: 90,000 on this machine's KVM, 10,000 in the lab, there against KVM's own nesting too
	@$(UMBRA) run hostile --nesting umbra --memory 4M --alias 2 --strategy log --mechanism kvm-clear --edits 90000 $(ARGS) || [ $$? = 3 ]
	$(UMBRA) lab --clock wall hostile --nesting svm,umbra --memory 4M --alias 2 --strategy log --mechanism kvm-clear --edits 10000 $(ARGS)

.PHONY: bench-roots
bench-roots: build shelf ## which changes of mode cost a VM its page-table root: kernels 5.10 to 7.2, both MMUs, and the cures on Umbra's own
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/roots.toml --out target/bench/roots.json $(ARGS)

.PHONY: bench-vendors
bench-vendors: build shelf packages-vmx ## AMD and Intel in one table: a page of L1 and of its L2, each of kvm_intel's parameters, other kernels
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/vendors.toml --out target/bench/vendors.json

.PHONY: soak
soak: build ## two vCPUs write while every tracker harvests, on this machine's KVM, for SECONDS (60)
	@$(UMBRA) run soak --vcpus 2 --seconds $(SECONDS) $(ARGS)

.PHONY: bench-trackers
bench-trackers: build shelf ## which tracker for a snapshot: a written and a clean page under each, in the lab and on this machine's KVM
	@for backing in anonymous thp shmem; do $(UMBRA) lab snapshot --memory 16M --backing $$backing $(ARGS); done
	for backing in anonymous thp shmem; do $(UMBRA) run snapshot --memory 16M --rounds 10 --backing $$backing $(ARGS) || [ $$? = 3 ]; done

# Exit code 1 over the limit, 2 for bad input, 3 for what cannot be had; make itself ends with 2 whatever failed.
.PHONY: ab
ab: build ## S ("dirty-log ...") on the kernels A and B, compared; fails if a phase of B costs over OVER (1) percent more
	@if [ -z '$(A)' ]; then
	    echo 'ab compares two kernels: make ab A=6.12 B=arch/x86/boot/bzImage B_MODULES=DIR S="dirty-log --memory 16M"' >&2
	    exit 2
	fi
	$(UMBRA) lab ab --kernel '$(A)' $(if $(A_MODULES),--modules '$(A_MODULES)') $(A_PARAMS:%=--param %) $(if $(B),--b-kernel '$(B)') \
	    $(if $(B_MODULES),--b-modules '$(B_MODULES)') $(B_PARAMS:%=--b-param %) --fail-over $(OVER) $(S) $(ARGS)

.PHONY: bench-peer
bench-peer: build ## Umbra beside the kernel's own dirty_log_perf_test, phase by phase, in the lab
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/peer.toml --out target/bench/peer.json

.PHONY: bench-history
bench-history: build ## what a page costs on every kernel of the shelf, 5.10 to 7.3-rc
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/history.toml --out target/bench/history.json

.PHONY: bench-matrix
bench-matrix: build ## forty boots, two at a time: how near their time comes to half of its sum (on a quiet machine at most 1.1 times)
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/forty.toml --out target/bench/forty.json

.PHONY: bench-collapse
bench-collapse: build ## what logging leaves behind: huge mappings and speed after a stop, on every kernel and on the shadow MMU
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/collapse.toml --out target/bench/collapse.json

.PHONY: bench-dirty-rate
bench-dirty-rate: build shelf ## what dirty-rate tools find, what they cost the guest and leave behind: three rates, in the lab
	@for rate in 10 50 150; do $(UMBRA) lab dirty-rate --rate $$rate $(ARGS); done

.PHONY: bench-memory
bench-memory: build ## what KVM's own MMU takes in bytes, on four kernels, beside umbra-mmu
	@mkdir -p target/bench
	$(UMBRA) lab matrix --spec images/specs/memory.toml --out target/bench/memory.json
	for alias in 1 4; do $(UMBRA) run model --memory 16M --format npt --alias $$alias --alias-kind scattered --strategy write-protect; done

.PHONY: noise
noise: build ## the noise floor: one run in eight images that are merely shifted, on an old and a new kernel
	@for kernel in 6.12 7.2; do $(UMBRA) lab noise --kernel $$kernel dirty-log $(if $(findstring --memory,$(ARGS)),,--memory 16M) $(ARGS); done

.PHONY: bench-strategies
bench-strategies: build shelf ## the shadow MMU's strategies on one run, in one table: each way to split and collapse, in the lab
	@$(UMBRA) lab matrix --spec images/specs/strategies.toml $(ARGS)

# The shadow MMU's own programs (monitor/mmu/examples).
mmu = cargo run --locked --quiet --release --package umbra-mmu --example

.PHONY: fuzz
fuzz: packages ## the shadow MMU against its reference model: N (10,000,000) random operations from SEED, or REPLAY=FILE
	@$(mmu) fuzz -- SEED=$(SEED) N=$(N) $(if $(REPLAY),REPLAY=$(REPLAY))

.PHONY: fuzz-tables
fuzz-tables: packages ## hostile guest tables against the shadow MMU, for SECONDS
	@timeout $$(($(SECONDS) + 120)) $(mmu) fuzz_tables -- SEED=$(SEED) SECONDS=$(SECONDS)

.PHONY: bench-mmu
bench-mmu: packages-bench ## what each operation of the shadow MMU costs, in instructions (callgrind), with 64 MiB to 1 TiB of L2; some minutes
	@$(mmu) bench_mmu -- MIB=64,1024,16384,1048576 ROOM=0

.PHONY: bench-caches
bench-caches: packages ## the shadow MMU's split caches: minimum and capacity against refills and bytes
	@$(mmu) bench_caches

.PHONY: test-fresh
test-fresh: ## `make run` and `make test` in minimal chroots of Debian 12 and 13 (SUITES); root, mmdebstrap; some GB, some minutes
	@tests/fresh $(SUITES)

.PHONY: clean
clean: ## remove what was built; fetched kernels stay in the cache
	@rm -rf target

# The lab's default kernel, in the cache.
.PHONY: shelf
shelf: build
	@$(UMBRA) kernels fetch

# What the others need: installed with apt if it is not here. A machine that has it all needs no network for this. What the machine
# vmx and counting instructions need besides is installed where they are asked for.
.PHONY: packages packages-vmx packages-bench
packages packages-vmx packages-bench:
	@missing=()
	needs() { "$${@:2}" >/dev/null 2>&1 || missing+=("$$1"); }
	needs gcc             command -v cc
	needs libc6-dev       eval 'test -e "$$(cc -print-file-name=libc.a)"'
	needs ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
	needs xz-utils        command -v xz
	case $@ in
	packages)
	    needs qemu-system-x86 command -v qemu-system-x86_64 ;;
	packages-vmx)
	    needs bochs           command -v bochs
	    needs bochs-term      eval 'ls /usr/lib/*/bochs/plugins/libbx_term_gui.so*'
	    needs seabios         test -e /usr/share/seabios/vgabios-stdvga.bin
	    needs isolinux        test -e /usr/lib/ISOLINUX/isolinux.bin
	    needs syslinux-common test -e /usr/lib/syslinux/modules/bios/ldlinux.c32
	    needs xorriso         command -v xorriso ;;
	packages-bench)
	    needs valgrind        command -v valgrind ;;
	esac
	rust() { ($(new_enough)); }
	if [ $${#missing[@]} = 0 ] && rust; then exit; fi

	as_root=()
	if [ "$$(id -u)" != 0 ]; then as_root=(sudo); fi
	for tool in apt-get "$${as_root[@]}"; do
	    if ! command -v $$tool >/dev/null; then
	        rust || missing+=('Rust $(RUST) or newer')
	        echo "Umbra needs $$(printf '%s, ' "$${missing[@]}" | sed 's/, $$//'): not here, and there is no $$tool to install it with" >&2
	        exit 1
	    fi
	done
	apt() { "$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$$@"; }
	apt update
	if ! rust; then
	    # Debian 12 and 13 keep a newer Rust beside their own, for Firefox. Only CI has to have the tools for format and lints.
	    new() { dpkg --compare-versions "$$(apt-cache policy "$$1" | sed -n 's/^ *Candidate: \([0-9]\)/\1/p')" ge $(RUST); }
	    if   new cargo;     then missing+=(cargo $${CI:+rustfmt rust-clippy})
	    elif new cargo-web; then missing+=(cargo-web $${CI:+rustfmt-web rust-web-clippy})
	    else
	        echo 'Umbra needs Rust $(RUST) or newer, and apt has none here; `rustup toolchain install stable` brings it' >&2
	        exit 1
	    fi
	fi
	# Nothing of this machine is removed to make room (an older Rust from Debian, say). A package of a newer release that is in the way
	# (qemu-utils from backports refuses the QEMU of its own Debian) is replaced by the one that this machine's sources have.
	options=(install --no-install-recommends)
	for package in $$("$${as_root[@]}" apt-get -s "$${options[@]}" "$${missing[@]}" | awk '/^Remv / { print $$2 }'); do
	    version=$$(apt-cache madison "$$package" | awk -F' *[|] *' 'NR == 1 { print $$2 }')
	    if [ -z "$$version" ]; then
	        echo "$${missing[*]}: apt would have to remove $$package, which its sources have in no other version; remove it yourself first" >&2
	        exit 1
	    fi
	    echo "$$package $$(dpkg-query -W -f '$${Version}' "$$package") is in the way; $$version takes its place"
	    missing+=("$$package=$$version")
	    options+=(--allow-downgrades)
	done
	echo "installing $${missing[*]}"
	apt "$${options[@]}" -y --no-remove "$${missing[@]}" >/dev/null
	rust
