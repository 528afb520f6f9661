"""attnkit inside other libraries: importing a module of this package registers attnkit with the library it is named after."""
