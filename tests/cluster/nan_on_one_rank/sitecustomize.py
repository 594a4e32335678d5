"""Python imports this first where its folder is on PYTHONPATH: one rank's loss becomes NaN in one forward pass.

KSUB_TEST_NAN="RANK CALL" says where and when; every other process is left alone.
"""

import os
import sys

rank, _, call = os.environ.get("KSUB_TEST_NAN", "").partition(" ")

if "ksub_ds.pretrain" in sys.orig_argv and os.environ.get("RANK") == rank:
    from ksub_ds import KSubRobertaForMaskedLM

    forward, calls = KSubRobertaForMaskedLM.forward, 0

    def broken(self, *arguments, **keywords):
        """The real forward pass, but for one call."""
        global calls
        calls += 1
        output = forward(self, *arguments, **keywords)
        if calls == int(call):
            output.loss = output.loss * float("nan")
        return output

    KSubRobertaForMaskedLM.forward = broken
