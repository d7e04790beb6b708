"""Tests the commands with killed runs, full disks, concurrent processes and damaged files:

    python bench/faults.py --minutes 20

Prints tries and failures of each campaign, and how to repeat the first failure; the exit status is
1 if something failed. The campaigns are in kills.py, concurrency.py and damage.py.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("DEV", "CPU")
from bench import campaign, concurrency, damage, kills, light


def campaigns() -> list[campaign.Campaign]:
    return [*kills.campaigns(), *concurrency.campaigns(), *damage.campaigns()]


if __name__ == "__main__":
    campaign.load_shim()
    light.warm_up()
    sys.exit(campaign.main("faults.py", __doc__, campaigns, 20))
