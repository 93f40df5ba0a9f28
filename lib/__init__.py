"""What a first reading may skip: official data, retrieval, generated tasks, scripted players, models, settings, runs.

Import it before torch. OpenMP's threads spin while they wait for each other, unless told not to: beside two other
programs on two cores a training step took 90 s instead of 3. The variable counts only where the user has not set it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
