# quantize.mk: the pipeline as make rules (GNU make 4.2 or later).
#
#   make -f quantize.mk MODEL=dir OUT=dir [DATA="file ..."] [variables below] [calib|plan|awq|workspace|info]
#
# OUT gets the files calib and plan and the directories awq and workspace. Each is made when something it
# comes from is newer or an option that matters to it has changed, and appears complete or not at all: a
# second run does nothing, a killed one goes on where it was. A directory counts as made when its own
# manifest.json is there, which the tools write last. Names must be free of spaces.
#
#   METHOD     rtn, lmdeploy, awq, gptq or best; rtn needs no calibration [best]
#   DATA       calibration texts; without any the model writes its own
#   DATASET    how the rows of DATA are joined: wikitext2 ptb c4 pileval
#   SAMPLES    calibration windows; best gains from several hundred   [128]
#   SEQLEN     tokens of a window                                     [512]
#   PICK       windows from random places, or from the first on       [random]
#   SEED       of every random choice                                 [0]
#   GROUP      weights that share a scale: 32, 64 or 128. Only 128 makes a workspace;
#              tm-run reads the awq directory of any                  [128]
#   TP         devices that the workspace is split for                [1]
#   THREADS    CPU threads, 0 for all; results do not depend on it    [0]
#   CALIB_FLAGS SEARCH_FLAGS PACK_FLAGS CONVERT_FLAGS                 further options of a tool
#   BIN        folder of the tools; empty: found by PATH
METHOD  ?= best
SAMPLES ?= 128
SEQLEN  ?= 512
PICK    ?= random
SEED    ?= 0
GROUP   ?= 128
TP      ?= 1
THREADS ?= 0

ifeq ($(strip $(MODEL)),)
$(error MODEL: expected a model directory: make -f quantize.mk MODEL=dir OUT=dir)
endif
ifeq ($(strip $(OUT)),)
$(error OUT: expected a directory for the results: make -f quantize.mk MODEL=dir OUT=dir)
endif
ifeq ($(wildcard $(MODEL)/config.json),)
$(error MODEL: '$(MODEL)' has no config.json)
endif
$(foreach f,$(DATA),$(if $(wildcard $f),,$(error DATA: no file '$f')))

# not ".": ./calib and the phony calib would be one target
out := $(if $(filter . ./,$(OUT)),$(CURDIR),$(OUT:%/=%))
bin := $(if $(BIN),$(BIN:/=)/)
model_files := $(wildcard $(foreach p,*.json *.safetensors tokenizer.model merges.txt *.tiktoken *.jinja,$(MODEL)/$p))

calib     := $(out)/calib
plan      := $(out)/plan
awq       := $(out)/awq/manifest.json
workspace := $(out)/workspace/manifest.json

calib_opts   := $(if $(DATA),$(DATA:%=--data %) $(DATASET:%=--dataset %),--dataset self) --samples $(SAMPLES) \
                --seqlen $(SEQLEN) --pick $(PICK) --seed $(SEED) $(CALIB_FLAGS)
plan_opts    := --method $(METHOD) --group-size $(GROUP) $(SEARCH_FLAGS)
awq_opts     := $(PACK_FLAGS)
convert_opts := --tp $(TP) $(CONVERT_FLAGS)
threads      := --threads $(THREADS)

.PHONY: all calib plan awq workspace info
all: $(if $(filter 128,$(GROUP)),$(workspace),$(awq))
calib: $(calib)
plan: $(plan)
awq: $(awq)
workspace: $(workspace)
info: all
	$(bin)tm-run info $(if $(filter 128,$(GROUP)),$(out)/workspace,$(out)/awq)
# The options of a step are a file that changes only when they do. It is written while make reads this, so
# that an unchanged pipeline runs nothing at all; under -n and -q it only counts as changed.
looking := $(findstring n,$(firstword -$(MAKEFLAGS)))$(findstring q,$(firstword -$(MAKEFLAGS)))
define remember # STEP OPTIONS
ifneq ($$(file <$(out)/.$1.opts),options: $(strip $2))
ifeq ($(looking),)
$$(file >$(out)/.$1.opts,options: $(strip $2))
else
.PHONY: $(out)/.$1.opts
endif
endif
endef
ifeq ($(looking),)
$(shell mkdir -p $(out))
endif
$(eval $(call remember,calib,$(calib_opts)))
$(eval $(call remember,plan,$(plan_opts)))
$(eval $(call remember,awq,$(awq_opts)))
$(eval $(call remember,workspace,$(convert_opts)))

# The tools leave a result alone that is up to date in content; its time then moves here, so that make sees
# it too.
$(calib): $(model_files) $(DATA) $(out)/.calib.opts
	$(strip $(bin)calib-collect $(MODEL) $(calib_opts) $(threads) -o $@)
	@touch $@

$(plan): $(model_files) $(if $(filter rtn,$(METHOD)),,$(calib)) $(out)/.plan.opts
	$(strip $(bin)awq-search $(MODEL) $(if $(filter rtn,$(METHOD)),,--calib $(calib)) $(plan_opts) $(threads) -o $@)
	@touch $@

$(awq): $(model_files) $(plan) $(out)/.awq.opts
	$(strip $(bin)pack-w4 $(MODEL) --plan $(plan) $(awq_opts) $(threads) -o $(out)/awq)
	@touch $@

$(workspace): $(awq) $(out)/.workspace.opts
	$(strip $(bin)tm-convert $(out)/awq $(convert_opts) -o $(out)/workspace)
	@touch $@
