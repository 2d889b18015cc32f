"""SGLang's native dialect, as trainers and routers speak it; docs/sglang.md says what is the same and what is not."""
