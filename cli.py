from compress.main import main

main()
