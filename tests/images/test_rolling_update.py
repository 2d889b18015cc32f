"""A rolling update as Kubernetes does it, with two containers behind a proxy: no request is lost."""

from __future__ import annotations
