class Registry(dict):
    def register(self):
        def add(cls):
            self[cls.__name__] = cls
            return cls

        return add
