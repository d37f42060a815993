"""Do clusters stay tasks when there are more of them? Trains, probes and draws 16 to 128 tasks.

    make scale                                two seeds of each size, into runs/scale
    python examples/scale.py --out FOLDER     a run that is there is not trained again

A study of one's own, from outside: knobs of train.py, rows of probe.py, lines of plot.py. Only the number of
tasks changes, and with it the number of training steps, as more tasks need more of them.
"""
