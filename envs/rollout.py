from envs.play import Played, play  # noqa: F401
