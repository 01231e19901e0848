from adapt_pruner_jax.main import main

if __name__ == "__main__":
  main()
