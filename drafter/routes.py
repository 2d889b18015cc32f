"""Routes: which version of the learned drafter a request uses."""

SHARED_ROUTE = ""
CANARY_ROUTE = "canary"
TENANT_ROUTE, DOMAIN_ROUTE, ADAPTER_ROUTE = "tenant:", "domain:", "lora:"
"""Before the name of the tenant, the domain or the LoRA."""
