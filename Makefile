# make demo      writes a tiny checkpoint and data set, trains, evaluates       (SCRIPT=llava_med,
#                qwen2vl_sentinel, surg_video_vqa, umbrella_mri, or video_plain_lm)
# make test      ruff, then the tests
# make bench     the benchmarks of a CPU: 25 minutes on two idle cores (docs/benchmarks.md)
# make mutants   one-line faults, one at a time: each must be caught by a test (ten minutes; not part of make test)
# All set up .venv with the pinned versions first; when nothing has changed, that takes no time.

PYTHON ?= python3
SCRIPT ?= llava_med
DEMO = runs/demo/$(SCRIPT)
llava_med_flags = --tune full --lr 1e-3 --epochs 8 --pack-tokens 512 --eval-every 400
surg_video_vqa_flags = --audio-model $(DEMO)/whisper --tune full --lr 3e-4 --epochs 7 --questions-per-step 8 \
	--pack-tokens 1280 --frames 4 --eval-frames 4 --target short_answer --eval-every 400
umbrella_mri_flags = --modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2 --lr 5e-3 --epochs 5 \
	--questions-per-step 32 --pack-tokens 512 --eval-every 400
video_plain_lm_flags = --vision-model $(DEMO)/vision --from-scratch --cache-features $(DEMO)/features \
	--fast-frames 2 --slow-frames 2 --slow-grid 6 --lr 7e-4 --epochs 6 --questions-per-step 8 --pack-tokens 1024 \
	--eval-every 720
qwen2vl_sentinel_flags = --tune full --lr 1e-3 --epochs 4 --pack-tokens 1024 --eval-every 400

export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_PROGRESS_BARS = 1
export PYTHONUNBUFFERED = 1

.PHONY: demo test mutants bench
demo: .venv/installed
	rm -rf $(DEMO)
	.venv/bin/python -m demo $(SCRIPT)
	.venv/bin/python train_$(SCRIPT).py --model $(DEMO)/model --data $(DEMO)/data --out $(DEMO)/run --eval-split test \
		$($(SCRIPT)_flags)

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

mutants: .venv/installed
	.venv/bin/python tests/mutants.py

bench: .venv/installed runs/demo/qwen2vl_sentinel/run/model
	-.venv/bin/pip install --quiet -c constraints.txt trl==1.16.0
	.venv/bin/python benchmarks/training.py --steps 2 --json docs/training_cpu.json
	.venv/bin/python benchmarks/training.py --growth --steps 1 --json docs/growth_cpu.json
	.venv/bin/python benchmarks/answering.py --json docs/answering_cpu.json
	.venv/bin/python benchmarks/answering.py --larger --min-pixels 200704 --questions 60 --batches 8 --max-answer-tokens 8 \
		--rounds 3 --json docs/answering_larger_cpu.json
	.venv/bin/python benchmarks/answering.py --candidates 200 --questions 20 --pack-tokens 4096 --rounds 1 --json docs/ranking_cpu.json

runs/demo/qwen2vl_sentinel/run/model:
	$(MAKE) demo SCRIPT=qwen2vl_sentinel

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@
