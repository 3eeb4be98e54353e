import os
import signal
import threading

from diptych.errors import Interrupted, SignalWatch


def test_a_relayed_ctrl_c_counts_once():
    """A launcher passes on the terminal's Ctrl-C to children which have seen it themselves."""
    with SignalWatch() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending == signal.SIGINT


def test_the_first_signal_counts():
    with SignalWatch() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending == signal.SIGTERM


def test_it_watches_nothing_in_another_thread():
    def enter():
        with SignalWatch() as signals:
            seen.append(signals.pending)

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [0]


def test_the_message_says_how_to_go_on():
    assert str(Interrupted(signal.SIGTERM, step=7)).startswith("Stopped by SIGTERM after step 7; a checkpoint is saved")
