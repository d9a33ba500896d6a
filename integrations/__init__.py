"""Integrations with model libraries; imported as `flexprefill_fa.integrations`."""
