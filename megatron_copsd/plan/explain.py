"""Why a layout does not fit, and what would change that."""

from __future__ import annotations

from megatron_copsd.plan.memory import MemoryPlan

_REMEDIES = {
    "weights": "Cut the model over more GPUs: parallel.tensor, parallel.pipeline.",
    "gradients, fp32": "Cut the model over more GPUs: parallel.tensor, parallel.pipeline.",
    "optimizer state": "Shard it over more replicas: optimizer.distributed=true, more GPUs.",
    "activations": "Lower optimizer.micro_batch_size or prompt.max_student_tokens, or raise parallel.tensor.",
    "tensors between stages": "Lower optimizer.micro_batch_size.",
    "working tensors of one layer": "Lower optimizer.micro_batch_size or prompt.max_teacher_tokens.",
    "student's weights, aside": "Set teacher.weights=live, or cut the model over more GPUs.",
    "averaged teacher, fp32": "Set teacher.weights=frozen or live, or cut the model over more GPUs.",
    "loss scratch": "Lower loss.scratch_mb.",
    "response rows and their gradient": "Lower optimizer.micro_batch_size.",
    "teacher's hidden states [R, H]": "Lower teacher.cache_mb, or set teacher.cache=host.",
    "teacher's output weight": "Set teacher.weights=live, or raise parallel.tensor.",
    "weight sync": "Lower rollout.bucket_mb.",
    "embedded engine's model": "Set rollout.engine=sglang, with servers on other GPUs.",
    "embedded engine's cache": "Lower rollout.batch_size.",
    "rollout server": "Put the servers on other GPUs (sglang.release_memory=false), or raise sglang.tensor.",
    "framework reserve": "Nothing gives this back.",
}
_GIB = 1 << 30


def verdict(memory: MemoryPlan) -> list[str]:
    """Say whether the layout fits; if not, the three parts of the fullest phase that take most, with a remedy each."""
    phase, peak, capacity = memory.fullest_phase, memory.peak / _GIB, memory.capacity / _GIB
    if memory.fits:
        return [f"fits: {peak:.1f} of {capacity:.1f} GiB at the peak, in the {phase} phase; {capacity - peak:.1f} left"]
    parts = sorted((p for p in memory.parts if phase in p.phases), key=lambda part: -part.bytes)
    lines = [f"does not fit: the {phase} phase needs {peak:.1f} of {capacity:.1f} GiB, {peak - capacity:.1f} too many"]
    return lines + [f"  {part.name}: {part.bytes / _GIB:.1f} GiB. {_REMEDIES[part.name]}" for part in parts[:3]]
