"""What to tell a user whose run learns nothing, from the metrics of its last steps."""

PATIENCE = 3  # steps that must all show it


def advice(cfg, folder, recent):
    """Metrics of the last steps, oldest first -> {what is wrong: what it means and what to do}; {} where all is well.

    cfg: the run's settings; folder: of the run.
    """
    if len(recent) < PATIENCE or "rollout/invalid" not in recent[-1]:  # cloning plays no episodes
        return {}
    always = lambda name, least: all(metrics[name] >= least for metrics in recent[-PATIENCE:])
    won = sum(metrics["reward/success"] for metrics in recent[-PATIENCE:])
    look = f"read what it says: python eval.py --show {folder}"
    clone = f"python -m tools.clone --env {cfg.env} --model {cfg.model} --steps 100 --out runs/cloned"
    found = {}
    if always("rollout/cut_off", 0.999):
        found["cut off"] = (f"every response of {PATIENCE} steps was cut off at --max_response_tokens "
                            f"{cfg.max_response_tokens}: raise it, or {look}")
    if always("rollout/invalid", 0.999):
        found["invalid"] = (f"no turn of {PATIENCE} steps was valid, so there is nothing to learn from: {look}; a "
                            f"model that can't hold the answer format first clones the expert: {clone}")
    elif all(metrics.get("opid/analysed") == 0 for metrics in recent[-PATIENCE:]):
        found["not analysed"] = (f"no episode of {PATIENCE} steps got a valid analysis, so that opid trains as grpo: "
                                 "take --analyser rules, or a model that can write JSON")
    elif always("grpo/zero_variance_groups", 1) and won == 0:
        graded = ", --reward score" * (cfg.env == "webshop")
        found["never won"] = (f"no episode of {PATIENCE} steps was won, so no group has anything to compare: {look}; "
                              f"try a higher --temperature or --group_size{graded}, or clone the expert first: {clone}")
    elif always("grpo/zero_variance_groups", 1):
        found["all equal"] = (f"in every group of {PATIENCE} steps all episodes have equal returns (success "
                              f"{recent[-1]['reward/success']:.2f}), so eq. (1) is 0 for all of them: these tasks are "
                              "solved or too hard alike, or --temperature is too low")
    return found
