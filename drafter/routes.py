"""Routes: which version of the learned drafter a request uses."""

import re

SHARED_ROUTE = ""
CANARY_ROUTE = "canary"
TENANT_ROUTE, DOMAIN_ROUTE, ADAPTER_ROUTE = "tenant:", "domain:", "lora:"
"""Before the name of the tenant, the domain or the LoRA."""
DOMAIN_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
"""What requests may call a domain."""
