import contextlib, gc, json, sys, types, dataclasses, random, time
import torch
from torch.profiler import ProfilerActivity, profile
import lib
import sdar
from lib import memory, models

def live_bytes():
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type=="cpu"}
    return sum(storages.values())

@contextlib.contextmanager
def measured(device):
    found = types.SimpleNamespace()
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        yield found
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type().name == "CPU"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes(); top = max(top, now)
    found.peak, found.before = before + top, before
