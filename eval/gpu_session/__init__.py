"""What a short session on a GPU must tell of llmsparse: `eval/gpu_session.sh` runs the stages, `python -m eval.gpu_session
STAGE` one of them. Without a GPU all of it runs on tiny shapes in Triton's interpreter, to find typing errors."""
