"""Which keys may differ between two halves of one run; they are read without torch."""

# What may change between two halves of one run. Another device gives other last digits, and a GPU may train in bf16;
# so does another cache_dir, where prompts are embedded again in other batches.
KEPT = ("cache_dir", "data.cache", "data.cache_gib", "data.threads")
# The split of an earlier run is in the run's own folder by now.
MAY_DIFFER = (
    "resume",
    "run_dir",
    "dry_run",
    "data.keep_split",
    "trainer.accelerator",
    "trainer.max_time",
    *KEPT,
    "logger",
)
