#!/usr/bin/env python
"""The command of xlearner_d2/commands/train.py, from a checkout.

python train_net.py --config-file configs/quick/openmoji.yaml
"""

from xlearner_d2.commands import start

if __name__ == "__main__":
    start("train")
