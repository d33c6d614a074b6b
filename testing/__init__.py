"""What tests, benchmarks, studies and scripts share: sample calls, the backends here, pages, the machine."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout; processes that tests start run there
